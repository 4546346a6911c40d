//! [`Tree`]: a persistent ordered map, of which a copy costs nothing.

mod changes;

use std::ops::RangeInclusive;
use std::sync::Arc;

/// Most entries of a leaf and most children of an inner node. A change copies one node of each level.
const MOST: usize = 32;
/// Fewest, except in the root.
const FEWEST: usize = MOST / 4;

/// Values by a 64-bit key, in order: a B+ tree whose copies share their nodes.
///
/// A copy is one reference count, whatever the number of entries, so that a batch can go back to the mappings of its beginning
/// without having copied them. A change copies only the nodes on the way to its entry that a copy shares: an IOTLB with a
/// million entries gives the data path its next translation after each change at the cost of a few nodes.
#[derive(Debug)]
pub struct Tree<T> {
    root: Arc<Node<T>>,
    len: usize,
}

#[derive(Clone, Debug)]
enum Node<T> {
    Leaf {
        keys: Vec<u64>,
        values: Vec<T>,
    },
    /// `keys` are the first keys of the children.
    Inner {
        keys: Vec<u64>,
        children: Vec<Arc<Self>>,
    },
}

/// Copies share everything.
impl<T> Clone for Tree<T> {
    fn clone(&self) -> Self {
        Self { root: Arc::clone(&self.root), len: self.len }
    }
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Self { root: Arc::new(Node::Leaf { keys: Vec::new(), values: Vec::new() }), len: 0 }
    }
}

impl<T> Tree<T> {
    /// Number of entries.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of `key`.
    #[must_use]
    pub fn get(&self, key: u64) -> Option<&T> {
        self.floor(key).filter(|(found, _)| *found == key).map(|(_, value)| value)
    }

    /// The entry with the greatest key that is not greater than `key`.
    #[must_use]
    #[inline]
    pub fn floor(&self, key: u64) -> Option<(u64, &T)> {
        let mut node = &*self.root;
        loop {
            match node {
                Node::Leaf { keys, values } => {
                    let at = up_to(keys, key).checked_sub(1)?;
                    return Some((*keys.get(at)?, values.get(at)?));
                }
                // Of a key that is less than all, the first leaf has no entry up to it either.
                Node::Inner { keys, children } => node = children.get(up_to(keys, key).saturating_sub(1))?,
            }
        }
    }

    /// All entries in ascending order of keys.
    pub fn iter(&self) -> Iter<'_, T> {
        self.range(0..=u64::MAX)
    }

    /// The entries with keys in `keys`, in ascending order.
    #[must_use]
    pub fn range(&self, keys: RangeInclusive<u64>) -> Iter<'_, T> {
        let keys = (!keys.is_empty()).then(|| keys.into_inner());
        Iter { root: &self.root, front: Leaf::default(), back: Leaf::default(), keys }
    }
}

impl<T: Clone> Tree<T> {
    /// Adds an entry; returns the value that `key` had.
    pub fn insert(&mut self, key: u64, value: T) -> Option<T> {
        let (replaced, split) = insert(Arc::make_mut(&mut self.root), key, value);
        if let Some((middle, right)) = split {
            let left = std::mem::replace(&mut self.root, right);
            let right = std::mem::replace(&mut self.root, Self::default().root);
            let keys = vec![left.first_key().unwrap_or(0), middle];
            self.root = Arc::new(Node::Inner { keys, children: vec![left, right] });
        }
        self.len += usize::from(replaced.is_none());
        replaced
    }

    /// Removes an entry and returns its value.
    pub fn remove(&mut self, key: u64) -> Option<T> {
        // Nothing is copied for a key that does not exist.
        self.get(key)?;
        let removed = remove(Arc::make_mut(&mut self.root), key)?;
        self.len -= 1;
        while let Node::Inner { children, .. } = &*self.root
            && let [only] = children.as_slice()
        {
            let only = Arc::clone(only);
            self.root = only;
        }
        Some(removed)
    }

    /// The value of `key`, to be changed.
    pub fn get_mut(&mut self, key: u64) -> Option<&mut T> {
        self.get(key)?;
        let mut node = Arc::make_mut(&mut self.root);
        loop {
            match node {
                Node::Leaf { keys, values } => return values.get_mut(keys.binary_search(&key).ok()?),
                Node::Inner { keys, children } => {
                    node = Arc::make_mut(children.get_mut(up_to(keys, key).checked_sub(1)?)?);
                }
            }
        }
    }

    /// Calls `change` with each value, in order. Copies every node that is shared.
    pub fn for_each_mut(&mut self, mut change: impl FnMut(&mut T)) {
        for_each_mut(Arc::make_mut(&mut self.root), &mut change);
    }
}

impl<T: Clone> FromIterator<(u64, T)> for Tree<T> {
    fn from_iter<I: IntoIterator<Item = (u64, T)>>(entries: I) -> Self {
        let mut tree = Self::default();
        entries.into_iter().for_each(|(key, value)| drop(tree.insert(key, value)));
        tree
    }
}

/// Number of keys that are not greater than `key`.
#[inline]
fn up_to(keys: &[u64], key: u64) -> usize {
    keys.partition_point(|&first| first <= key)
}

impl<T> Node<T> {
    fn first_key(&self) -> Option<u64> {
        match self {
            Self::Leaf { keys, .. } | Self::Inner { keys, .. } => keys.first().copied(),
        }
    }

    /// Levels below it.
    fn height(&self) -> u32 {
        let (mut node, mut height) = (self, 0);
        while let Self::Inner { children, .. } = node
            && let Some(child) = children.first()
        {
            (node, height) = (child, height + 1);
        }
        height
    }

    const fn len(&self) -> usize {
        match self {
            Self::Leaf { keys, .. } | Self::Inner { keys, .. } => keys.len(),
        }
    }
}

impl<T: Clone> Node<T> {
    /// Moves the upper half into a node of its own, with its first key.
    fn split(&mut self) -> Option<(u64, Arc<Self>)> {
        if self.len() <= MOST {
            return None;
        }
        let right = match self {
            Self::Leaf { keys, values } => Self::Leaf { keys: halve(keys), values: halve(values) },
            Self::Inner { keys, children } => Self::Inner { keys: halve(keys), children: halve(children) },
        };
        Some((right.first_key()?, Arc::new(right)))
    }

    /// Moves everything of a node with greater keys behind the own.
    fn append(&mut self, right: Self) {
        match (self, right) {
            (Self::Leaf { keys, values }, Self::Leaf { keys: more_keys, values: more_values }) => {
                keys.extend(more_keys);
                values.extend(more_values);
            }
            (Self::Inner { keys, children }, Self::Inner { keys: more_keys, children: more_children }) => {
                keys.extend(more_keys);
                children.extend(more_children);
            }
            // All leaves have the same depth.
            _ => {}
        }
    }
}

/// The upper half of a list, with room for more.
fn halve<V>(list: &mut Vec<V>) -> Vec<V> {
    let half = list.len() / 2;
    let mut right = Vec::with_capacity(MOST + 1);
    right.extend(list.drain(half..));
    right
}

type Split<T> = Option<(u64, Arc<Node<T>>)>;

/// Adds an entry below `node`; what was there, and the second half of the node if it became too large.
fn insert<T: Clone>(node: &mut Node<T>, key: u64, value: T) -> (Option<T>, Split<T>) {
    match node {
        Node::Leaf { keys, values } => {
            let at = up_to(keys, key);
            let before = at.checked_sub(1).filter(|&before| keys.get(before) == Some(&key));
            if let Some(place) = before.and_then(|before| values.get_mut(before)) {
                return (Some(std::mem::replace(place, value)), None);
            }
            keys.insert(at, key);
            values.insert(at, value);
            (None, node.split())
        }
        Node::Inner { keys, children } => {
            let at = up_to(keys, key).saturating_sub(1);
            let (Some(least), Some(child)) = (keys.get_mut(at), children.get_mut(at)) else {
                return (None, None);
            };
            *least = key.min(*least);
            let (replaced, split) = insert(Arc::make_mut(child), key, value);
            if let Some((middle, right)) = split {
                keys.insert(at + 1, middle);
                children.insert(at + 1, right);
            }
            (replaced, node.split())
        }
    }
}

/// Removes an entry below `node`, whose children keep their least size.
fn remove<T: Clone>(node: &mut Node<T>, key: u64) -> Option<T> {
    match node {
        Node::Leaf { keys, values } => {
            let at = keys.binary_search(&key).ok()?;
            keys.remove(at);
            Some(values.remove(at))
        }
        Node::Inner { keys, children } => {
            let at = up_to(keys, key).saturating_sub(1);
            let (first, child) = keys.get_mut(at).zip(children.get_mut(at).map(Arc::make_mut))?;
            let removed = remove(child, key)?;
            // Without it an address would be looked for in a leaf that begins after it.
            *first = child.first_key().unwrap_or(*first);
            if child.len() < FEWEST {
                join(keys, children, at);
            }
            Some(removed)
        }
    }
}

/// Joins a child that has become too small with a neighbour, and parts both again if that is too large.
fn join<T: Clone>(keys: &mut Vec<u64>, children: &mut Vec<Arc<Node<T>>>, at: usize) {
    let left = if at + 1 < children.len() { at } else { at.saturating_sub(1) };
    if left + 1 >= children.len() {
        return;
    }
    let right = Arc::unwrap_or_clone(children.remove(left + 1));
    keys.remove(left + 1);
    let Some(joined) = children.get_mut(left).map(Arc::make_mut) else { return };
    joined.append(right);
    if let Some((middle, right)) = joined.split() {
        keys.insert(left + 1, middle);
        children.insert(left + 1, right);
    }
}

fn for_each_mut<T: Clone>(node: &mut Node<T>, change: &mut impl FnMut(&mut T)) {
    match node {
        Node::Leaf { values, .. } => values.iter_mut().for_each(change),
        Node::Inner { children, .. } => {
            children.iter_mut().for_each(|child| for_each_mut(Arc::make_mut(child), change));
        }
    }
}

/// Entries in order, from both ends.
#[derive(Debug)]
pub struct Iter<'a, T> {
    root: &'a Node<T>,
    /// The leaf that the last entry from this end was in.
    front: Leaf<'a, T>,
    back: Leaf<'a, T>,
    /// The keys still to come; `None` at the end.
    keys: Option<(u64, u64)>,
}

/// The entries of a leaf that are still to come.
#[derive(Debug)]
struct Leaf<'a, T> {
    keys: &'a [u64],
    values: &'a [T],
}

impl<T> Default for Leaf<'_, T> {
    fn default() -> Self {
        Self { keys: &[], values: &[] }
    }
}

impl<T> Node<T> {
    /// The part of a leaf that begins with the least key that is not less than `key`.
    fn at_least(&self, key: u64) -> Option<Leaf<'_, T>> {
        let (mut node, mut next, mut key) = (self, None, key);
        loop {
            match node {
                Self::Inner { keys, children } => {
                    let at = up_to(keys, key).saturating_sub(1);
                    next = children.get(at + 1).or(next);
                    node = children.get(at)?;
                }
                Self::Leaf { keys, values } => {
                    let at = keys.partition_point(|&first| first < key);
                    if at < keys.len() {
                        return Some(Leaf { keys: keys.get(at..)?, values: values.get(at..)? });
                    }
                    // Everything here is less: the first entry of the following leaf.
                    (node, key) = (next.take()?, 0);
                }
            }
        }
    }

    /// The part of a leaf that ends with the greatest key that is not greater than `key`.
    fn at_most(&self, key: u64) -> Option<Leaf<'_, T>> {
        let mut node = self;
        loop {
            match node {
                Self::Inner { keys, children } => node = children.get(up_to(keys, key).saturating_sub(1))?,
                Self::Leaf { keys, values } => {
                    let end = up_to(keys, key);
                    return (end > 0).then_some(Leaf { keys: keys.get(..end)?, values: values.get(..end)? });
                }
            }
        }
    }
}

impl<'a, T> Iterator for Iter<'a, T> {
    type Item = (u64, &'a T);

    fn next(&mut self) -> Option<Self::Item> {
        let (first, last) = self.keys?;
        if self.front.keys.is_empty() {
            self.front = self.root.at_least(first).unwrap_or_default();
        }
        let found = self.front.keys.split_first().zip(self.front.values.split_first());
        let found = found.filter(|&((&key, _), _)| key <= last);
        let Some(((&key, keys), (value, values))) = found else {
            self.keys = None;
            return None;
        };
        self.front = Leaf { keys, values };
        self.keys = key.checked_add(1).filter(|&next| next <= last).map(|next| (next, last));
        Some((key, value))
    }
}

impl<T> DoubleEndedIterator for Iter<'_, T> {
    fn next_back(&mut self) -> Option<Self::Item> {
        let (first, last) = self.keys?;
        if self.back.keys.is_empty() {
            self.back = self.root.at_most(last).unwrap_or_default();
        }
        let found = self.back.keys.split_last().zip(self.back.values.split_last());
        let found = found.filter(|&((&key, _), _)| key >= first);
        let Some(((&key, keys), (value, values))) = found else {
            self.keys = None;
            return None;
        };
        self.back = Leaf { keys, values };
        self.keys = key.checked_sub(1).filter(|&next| next >= first).map(|next| (first, next));
        Some((key, value))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    impl<T> Node<T> {
        /// Checks order, sizes and depth below; the depth.
        fn check(&self, root: bool, from: u64, to: u64) -> u32 {
            assert!(self.len() <= MOST && (root || self.len() >= FEWEST), "{} entries", self.len());
            match self {
                Self::Leaf { keys, values } => {
                    assert_eq!(keys.len(), values.len());
                    assert!(keys.is_sorted_by(|a, b| a < b));
                    assert!(keys.iter().all(|key| (from..=to).contains(key)));
                    0
                }
                Self::Inner { keys, children } => {
                    assert!(
                        keys.len() == children.len() && keys.len() > 1 && keys.is_sorted_by(|a, b| a < b)
                    );
                    assert!(keys[0] >= from);
                    assert!(children.iter().zip(keys).all(|(child, key)| child.first_key() == Some(*key)));
                    let depth = |(at, child): (usize, &Arc<Self>)| {
                        child.check(false, keys[at], keys.get(at + 1).map_or(to, |next| next - 1))
                    };
                    let depths: Vec<u32> = children.iter().enumerate().map(depth).collect();
                    assert!(depths.iter().all(|depth| *depth == depths[0]));
                    depths[0] + 1
                }
            }
        }
    }

    fn same(tree: &Tree<u32>, model: &BTreeMap<u64, u32>) {
        tree.root.check(true, 0, u64::MAX);
        assert_eq!(tree.len(), model.len());
        assert!(tree.iter().eq(model.iter().map(|(&key, value)| (key, value))));
        assert!(tree.iter().rev().eq(model.iter().rev().map(|(&key, value)| (key, value))));
    }

    #[test]
    fn many_entries_come_and_go_and_a_copy_stays_as_it_was() {
        let mut tree = Tree::default();
        let mut model = BTreeMap::new();
        // A number that is prime to the count visits every key.
        let keys = || (0..20_000u64).map(|i| i * 7_919 % 20_000);
        for key in keys() {
            assert_eq!(tree.insert(key, 1), model.insert(key, 1));
        }
        same(&tree, &model);
        let (copy, before) = (tree.clone(), model.clone());
        for key in keys().filter(|key| key % 3 != 0) {
            assert_eq!(tree.remove(key), model.remove(&key));
        }
        same(&tree, &model);
        tree.for_each_mut(|value| *value += 1);
        model.values_mut().for_each(|value| *value += 1);
        same(&tree, &model);
        for key in keys() {
            assert_eq!(tree.remove(key), model.remove(&key));
        }
        same(&tree, &model);
        same(&copy, &before);
    }

    #[test]
    fn a_change_copies_one_node_of_each_level() {
        let mut tree: Tree<Arc<()>> = (0..100_000).map(|key| (key, Arc::new(()))).collect();
        let _copy = tree.clone();
        let value = Arc::clone(tree.get(500).unwrap());
        tree.insert(50_000, Arc::new(()));
        assert_eq!(Arc::strong_count(&value), 2, "the entry is in a node that both share");
        let near = Arc::clone(tree.get(50_001).unwrap());
        assert_eq!(Arc::strong_count(&near), 3, "its node was copied");
    }

    /// A key with its value before and after.
    type Changed = (u64, Option<u32>, Option<u32>);

    /// The changes as a list, and how many values were compared.
    fn changes(old: &Tree<u32>, new: &Tree<u32>) -> (Vec<Changed>, usize) {
        let (mut list, mut compared) = (Vec::new(), 0);
        let same = |a: &u32, b: &u32| {
            compared += 1;
            a == b
        };
        new.changes_since(old, same, |key, before, after| list.push((key, before.copied(), after.copied())));
        (list, compared)
    }

    #[test]
    fn only_what_was_changed_is_looked_at() {
        let old: Tree<u32> = (0..100_000).map(|key| (2 * key, 1)).collect();
        let mut new = old.clone();
        assert_eq!(changes(&old, &new), (vec![], 0));
        new.insert(70_001, 5);
        new.remove(100_000);
        *new.get_mut(40_000).unwrap() = 3;
        let (list, compared) = changes(&old, &new);
        assert_eq!(list, [(40_000, Some(1), Some(3)), (70_001, None, Some(5)), (100_000, Some(1), None)]);
        assert!(compared < 8 * MOST, "{compared} values were compared");
        let none = Tree::default();
        assert_eq!((changes(&none, &old).0.len(), changes(&old, &none).0.len()), (100_000, 100_000));
        assert_eq!(changes(&none, &none), (vec![], 0));
    }

    impl<T> Tree<T> {
        /// Levels, and nodes that `other` does not share.
        pub(in crate::iotlb) fn own_nodes(&self, other: &Self) -> (usize, usize) {
            fn visit<T>(node: &Arc<Node<T>>, see: &mut impl FnMut(*const Node<T>) -> bool) {
                if see(Arc::as_ptr(node))
                    && let Node::Inner { children, .. } = &**node
                {
                    children.iter().for_each(|child| visit(child, see));
                }
            }
            let mut theirs = std::collections::HashSet::new();
            visit(&other.root, &mut |node| theirs.insert(node));
            let mut own = 0;
            visit(&self.root, &mut |node| {
                let is_own = !theirs.contains(&node);
                own += usize::from(is_own);
                is_own
            });
            (self.root.height() as usize + 1, own)
        }
    }

    #[test]
    fn the_ends_of_the_key_space_are_keys() {
        let tree: Tree<u32> = [(0, 1), (u64::MAX, 2)].into_iter().collect();
        assert_eq!((tree.floor(0), tree.floor(u64::MAX - 1)), (Some((0, &1)), Some((0, &1))));
        assert_eq!(tree.floor(u64::MAX), Some((u64::MAX, &2)));
        assert_eq!(tree.range(1..=u64::MAX).count(), 1);
        assert_eq!(tree.iter().rev().count(), 2);
        let (mut both, mut met) = (tree.iter(), Vec::new());
        met.extend(both.next());
        met.extend(both.next_back());
        assert_eq!((met.len(), both.next(), both.next_back()), (2, None, None));
        assert!(Tree::<u32>::default().floor(u64::MAX).is_none());
    }

    proptest! {
        #[test]
        fn agrees_with_a_map_of_the_standard_library(
            ops in prop::collection::vec((0..5u8, 0..300u64, 0..300u64), 0..900),
        ) {
            let (mut tree, mut model) = (Tree::default(), BTreeMap::new());
            let mut copies = Vec::new();
            for (op, a, b) in ops {
                match op {
                    0..=1 => prop_assert_eq!(tree.insert(a, 7), model.insert(a, 7)),
                    2 => {
                        let (here, there) = (tree.get_mut(a), model.get_mut(&a));
                        prop_assert_eq!(&here, &there);
                        here.into_iter().chain(there).for_each(|value| *value += 1);
                    }
                    3 => prop_assert_eq!(tree.remove(a), model.remove(&a)),
                    _ => {
                        copies.push((tree.clone(), model.clone()));
                        // Of a range whose end is before its beginning there is nothing.
                        let (first, last) = (a.min(b), a.max(b));
                        let range = || model.range(first..=last).map(|(&key, value)| (key, value));
                        prop_assert!(tree.range(first..=last).eq(range()));
                        prop_assert!(tree.range(first..=last).rev().eq(range().rev()));
                        if a > b {
                            prop_assert_eq!(tree.range(a..=b).count(), 0);
                        }
                        let floor = model.range(..=a).next_back().map(|(&key, value)| (key, value));
                        prop_assert_eq!(tree.floor(a), floor);
                        prop_assert_eq!(tree.get(a), model.get(&a));
                    }
                }
            }
            copies.push((tree, model));
            for [(old, before), (new, after)] in copies.array_windows() {
                let keys: std::collections::BTreeSet<u64> = before.keys().chain(after.keys()).copied().collect();
                let value = |key| (before.get(&key).copied(), after.get(&key).copied());
                let expected = keys.into_iter().map(|key| (key, value(key))).filter(|(_, (a, b))| a != b);
                let expected: Vec<_> = expected.map(|(key, (before, after))| (key, before, after)).collect();
                prop_assert_eq!(changes(old, new).0, expected);
            }
            copies.iter().for_each(|(tree, model)| same(tree, model));
        }
    }
}
