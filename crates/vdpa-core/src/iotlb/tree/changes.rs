//! The difference of two trees.

use std::cmp::Ordering;
use std::sync::Arc;

use super::{Leaf, Node, Tree};

impl<T> Tree<T> {
    /// Calls `changed` for each key that `older` or `self` has alone, and for each whose values are not `same`, in ascending
    /// order: with the value in `older` and the value here.
    ///
    /// Nodes that both share are skipped. Where one was made from a copy of the other, this costs as much as was changed.
    pub fn changes_since<'a>(
        &'a self,
        older: &'a Self,
        mut same: impl FnMut(&T, &T) -> bool,
        mut changed: impl FnMut(u64, Option<&'a T>, Option<&'a T>),
    ) {
        let (mut old, mut new) = (vec![Part::Node(&older.root)], vec![Part::Node(&self.root)]);
        loop {
            match (old.last(), new.last()) {
                (None, None) => return,
                (Some(Part::Node(before)), Some(Part::Node(after))) => {
                    if Arc::ptr_eq(before, after) {
                        old.pop();
                        new.pop();
                        continue;
                    }
                    // The larger one, so that what is compared becomes the same node if there is one.
                    match before.height().cmp(&after.height()) {
                        Ordering::Less => open(&mut new),
                        Ordering::Greater => open(&mut old),
                        Ordering::Equal => match before.first_key().cmp(&after.first_key()) {
                            Ordering::Less => open(&mut old),
                            Ordering::Greater => open(&mut new),
                            Ordering::Equal => {
                                open(&mut old);
                                open(&mut new);
                            }
                        },
                    }
                }
                (before, after) => {
                    let first = |part: Option<&Part<'a, T>>| part.and_then(Part::first);
                    match (first(before), first(after)) {
                        // An empty node: the only one of its tree.
                        (None, _) if before.is_some() => drop(old.pop()),
                        (_, None) if after.is_some() => drop(new.pop()),
                        (Some((key, value)), other) if other.is_none_or(|(other, _)| key < other) => {
                            match value {
                                Some(value) => {
                                    changed(key, Some(value), None);
                                    skip(&mut old);
                                }
                                None => open(&mut old),
                            }
                        }
                        (other, Some((key, value))) if other.is_none_or(|(other, _)| key < other) => {
                            match value {
                                Some(value) => {
                                    changed(key, None, Some(value));
                                    skip(&mut new);
                                }
                                None => open(&mut new),
                            }
                        }
                        (Some((_, None)), _) => open(&mut old),
                        (_, Some((_, None))) => open(&mut new),
                        (Some((key, Some(before))), Some((_, Some(after)))) => {
                            if !same(before, after) {
                                changed(key, Some(before), Some(after));
                            }
                            skip(&mut old);
                            skip(&mut new);
                        }
                        (None, _) | (_, None) => return,
                    }
                }
            }
        }
    }
}

/// A part of a tree that is still to be compared.
#[derive(Debug)]
enum Part<'a, T> {
    Node(&'a Arc<Node<T>>),
    /// Not empty.
    Rest(Leaf<'a, T>),
}

impl<'a, T> Part<'a, T> {
    /// Its first key, with the value if that is at hand.
    fn first(&self) -> Option<(u64, Option<&'a T>)> {
        match self {
            Self::Node(node) => Some((node.first_key()?, None)),
            Self::Rest(leaf) => Some((*leaf.keys.first()?, Some(leaf.values.first()?))),
        }
    }
}

/// Replaces the node that comes next by what it consists of.
fn open<'a, T>(parts: &mut Vec<Part<'a, T>>) {
    let Some(Part::Node(node)) = parts.pop() else { return };
    match &**node {
        Node::Leaf { keys, .. } if keys.is_empty() => {}
        Node::Leaf { keys, values } => parts.push(Part::Rest(Leaf { keys, values })),
        Node::Inner { children, .. } => parts.extend(children.iter().rev().map(Part::Node)),
    }
}

/// Goes on behind the entry that comes next.
fn skip<T>(parts: &mut Vec<Part<'_, T>>) {
    if let Some(Part::Rest(leaf)) = parts.last_mut() {
        leaf.keys = leaf.keys.get(1..).unwrap_or_default();
        leaf.values = leaf.values.get(1..).unwrap_or_default();
        if leaf.keys.is_empty() {
            parts.pop();
        }
    }
}
