//! The devices of a program, by name.

use crate::session::Session;

/// Sessions that are updated together, each under a name that is unique among them.
#[derive(Debug)]
pub struct Devices<D> {
    list: Vec<(String, Session<D>)>,
}

impl<D> Default for Devices<D> {
    fn default() -> Self {
        Self { list: Vec::new() }
    }
}

impl<D> Devices<D> {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A list with one device.
    #[must_use]
    pub fn one(name: &str, session: Session<D>) -> Self {
        Self { list: vec![(name.to_owned(), session)] }
    }

    /// Adds a device. A repeated name is not checked here: prepare fails with
    /// [`Cause::DuplicateName`](super::Cause::DuplicateName), and both sessions stay intact.
    pub fn push(&mut self, name: &str, session: Session<D>) {
        self.list.push((name.to_owned(), session));
    }

    /// Removes a device; `None` if there is none of that name.
    pub fn take(&mut self, name: &str) -> Option<Session<D>> {
        let at = self.list.iter().position(|(n, _)| n == name)?;
        Some(self.list.remove(at).1)
    }

    /// The device of that name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Session<D>> {
        self.list.iter().find(|(n, _)| n == name).map(|(_, session)| session)
    }

    /// The device of that name, mutable: to drive it.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Session<D>> {
        self.list.iter_mut().find(|(n, _)| n == name).map(|(_, session)| session)
    }

    /// All devices, in the order in which they were added.
    pub fn iter(&self) -> Iter<'_, D> {
        self.into_iter()
    }

    /// All devices, mutable, in the same order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Session<D>)> {
        self.list.iter_mut().map(|(name, session)| (name.as_str(), session))
    }

    /// Number of devices.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether the list is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

impl<'a, D> IntoIterator for &'a Devices<D> {
    type Item = (&'a str, &'a Session<D>);
    type IntoIter = Iter<'a, D>;

    fn into_iter(self) -> Self::IntoIter {
        Iter(self.list.iter())
    }
}

/// The devices of [`Devices`], in their order.
#[derive(Debug)]
pub struct Iter<'a, D>(std::slice::Iter<'a, (String, Session<D>)>);

impl<'a, D> Iterator for Iter<'a, D> {
    type Item = (&'a str, &'a Session<D>);

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|(name, session)| (name.as_str(), session))
    }
}

impl<D> IntoIterator for Devices<D> {
    type Item = (String, Session<D>);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.into_iter()
    }
}

impl<D> FromIterator<(String, Session<D>)> for Devices<D> {
    fn from_iter<I: IntoIterator<Item = (String, Session<D>)>>(sessions: I) -> Self {
        Self { list: sessions.into_iter().collect() }
    }
}
