//! [`Tree`]: names, nodes and attributes of a session's files.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use vdpa_core::Errno;
use vdpa_sys::uapi::fuse::{Attr, Dirent, ROOT_ID, SetattrIn};
use zerocopy::IntoBytes;

use super::attributes::{self, FileAttributes, PERMISSIONS, SavedAttributes};
use super::request_queue::RequestQueue;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const DT_DIR: u32 = 4;
const DT_REG: u32 = 8;
const BLOCK: u32 = 4096;
/// `NAME_MAX`.
pub(super) const NAME_MAX: u32 = 255;
/// The first node id of a file. Node ids are also the offsets of READDIR, where 1 and 2 are those of "." and "..".
const FIRST_NODE: u64 = 3;

/// Why a device file could not be added.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddError {
    /// The name is not a valid file name.
    #[error(
        "{name:?} is no file name: it must have 1 to 255 bytes, no slash and no NUL, and not be \".\" or \"..\""
    )]
    Name {
        /// The name as it was given.
        name: String,
    },
    /// There is a device file of this name already.
    #[error("there is a device file {name:?} already")]
    Exists {
        /// The name as it was given.
        name: String,
    },
    /// The file, mount or character device cannot be created.
    #[error("{reason}")]
    Create {
        /// The reason, as a complete sentence.
        reason: String,
    },
}

#[derive(Debug)]
struct Node {
    name: String,
    attr: Attr,
    queue: Arc<RequestQueue>,
    /// The kernel's lookup count: LOOKUP replies less FORGETs.
    lookups: u64,
    /// Whether the name was not removed.
    linked: bool,
    /// Where each change of the attributes is written.
    saved: Option<SavedAttributes>,
}

/// The directory, and all nodes that the kernel has a reference to.
#[derive(Debug)]
pub(super) struct Tree {
    root: Attr,
    root_saved: Option<SavedAttributes>,
    nodes: BTreeMap<u64, Node>,
    names: HashMap<String, u64>,
    next: u64,
}

impl Tree {
    pub(super) fn new() -> Self {
        let root = FileAttributes { mode: 0o755, ..FileAttributes::private() };
        Self {
            root: attr(ROOT_ID, S_IFDIR, 2, root),
            root_saved: None,
            nodes: BTreeMap::new(),
            names: HashMap::new(),
            next: FIRST_NODE,
        }
    }

    /// One file with the node id `id` and no directory: a mount over a file ([`ROOT_ID`]), or a character device.
    pub(super) fn of_one_file(id: u64, queue: Arc<RequestQueue>, attributes: FileAttributes) -> Self {
        let name = queue.name().to_owned();
        let attr = attr(id, S_IFREG, 1, attributes);
        // The kernel never forgets the root of a mount.
        let node = Node { name: name.clone(), attr, queue, lookups: 1, linked: true, saved: None };
        Self { nodes: BTreeMap::from([(id, node)]), names: HashMap::from([(name, id)]), ..Self::new() }
    }

    /// Adds a file and returns its node id, which is never used again.
    pub(super) fn add(
        &mut self,
        queue: Arc<RequestQueue>,
        attributes: FileAttributes,
    ) -> Result<u64, AddError> {
        let name = queue.name().to_owned();
        if name.is_empty()
            || name.len() > NAME_MAX as usize
            || name.contains(['/', '\0'])
            || name == "."
            || name == ".."
        {
            return Err(AddError::Name { name });
        }
        if self.names.contains_key(&name) {
            return Err(AddError::Exists { name });
        }
        let id = self.next;
        self.next += 1;
        let attr = attr(id, S_IFREG, 1, attributes);
        self.names.insert(name.clone(), id);
        self.nodes.insert(id, Node { name, attr, queue, lookups: 0, linked: true, saved: None });
        Ok(id)
    }

    /// Adds a file that an earlier process had as the node `id`, which the kernel may know.
    pub(super) fn restore(
        &mut self,
        id: u64,
        queue: Arc<RequestQueue>,
        attributes: FileAttributes,
    ) -> Result<(), AddError> {
        let name = queue.name().to_owned();
        if self.names.contains_key(&name) || self.nodes.contains_key(&id) || id < FIRST_NODE {
            return Err(AddError::Exists { name });
        }
        self.next = self.next.max(id.saturating_add(1));
        let attr = attr(id, S_IFREG, 1, attributes);
        self.names.insert(name.clone(), id);
        // How often the kernel has looked it up is not known: its node stays as long as this process.
        let lookups = u64::from(u32::MAX);
        self.nodes.insert(id, Node { name, attr, queue, lookups, linked: true, saved: None });
        Ok(())
    }

    pub(super) fn remove(&mut self, name: &str) -> bool {
        let Some(id) = self.names.remove(name) else { return false };
        if let Some(node) = self.nodes.get_mut(&id) {
            node.linked = false;
            node.attr.nlink = 0;
        }
        self.reap(id);
        true
    }

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn lookup(&self, name: &[u8]) -> Option<Attr> {
        let id = self.names.get(str::from_utf8(name).ok()?)?;
        self.attr(*id)
    }

    /// Counts a LOOKUP reply that the kernel has received.
    pub(super) fn count_lookup(&mut self, id: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups += 1;
        }
    }

    pub(super) fn forget(&mut self, id: u64, lookups: u64) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(lookups);
        }
        self.reap(id);
    }

    fn reap(&mut self, id: u64) {
        if self.nodes.get(&id).is_some_and(|node| !node.linked && node.lookups == 0) {
            self.nodes.remove(&id);
        }
    }

    pub(super) fn attr(&self, id: u64) -> Option<Attr> {
        let node = self.nodes.get(&id).map(|node| node.attr);
        node.or_else(|| (id == ROOT_ID).then_some(self.root))
    }

    /// The request queue of a file to open; `None` when its name was removed.
    pub(super) fn queue(&self, id: u64) -> Option<Arc<RequestQueue>> {
        self.nodes.get(&id).filter(|node| node.linked).map(|node| Arc::clone(&node.queue))
    }

    pub(super) fn attributes(&self, name: &str) -> Option<FileAttributes> {
        let attr = self.lookup(name.as_bytes())?;
        Some(FileAttributes { mode: attr.mode & PERMISSIONS, uid: attr.uid, gid: attr.gid })
    }

    /// Applies a `chmod`, `chown` or `utimes` that the kernel has allowed.
    ///
    /// # Errors
    /// `ENOENT` for a node that does not exist; those of [`SavedAttributes::write`].
    pub(super) fn set_attr(&mut self, id: u64, change: &SetattrIn) -> Result<Attr, Errno> {
        let (attr, saved) = self.attr_mut(id).ok_or(Errno::NOENT)?;
        let mut changed = *attr;
        attributes::change(&mut changed, change);
        if let Some(saved) = saved {
            saved.write(&changed)?;
        }
        *attr = changed;
        Ok(changed)
    }

    /// Has each change of the attributes of a node written to `saved`, whose attributes are taken over if it has any.
    pub(super) fn save_attributes(&mut self, id: u64, saved: SavedAttributes) -> Result<(), Errno> {
        let (attr, place) = self.attr_mut(id).ok_or(Errno::NOENT)?;
        if !saved.read(attr) {
            saved.write(attr)?;
        }
        *place = Some(saved);
        Ok(())
    }

    fn attr_mut(&mut self, id: u64) -> Option<(&mut Attr, &mut Option<SavedAttributes>)> {
        match self.nodes.get_mut(&id) {
            Some(node) => Some((&mut node.attr, &mut node.saved)),
            None => (id == ROOT_ID).then_some((&mut self.root, &mut self.root_saved)),
        }
    }

    /// Entries after the cookie `offset`, in at most `room` bytes.
    pub(super) fn list(&self, offset: u64, room: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let dots = [(1, "."), (2, "..")].map(|(cookie, name)| (cookie, ROOT_ID, DT_DIR, name));
        let files = self.nodes.range(offset.saturating_add(1)..).filter(|(_, node)| node.linked);
        let files = files.map(|(&id, node)| (id, id, DT_REG, node.name.as_str()));
        for (off, ino, kind, name) in dots.into_iter().filter(|dot| dot.0 > offset).chain(files) {
            let padded = name.len().next_multiple_of(8);
            let Ok(namelen) = u32::try_from(name.len()) else { continue };
            if out.len() + size_of::<Dirent>() + padded > room {
                break;
            }
            out.extend_from_slice(Dirent { ino, off, namelen, kind }.as_bytes());
            out.extend_from_slice(name.as_bytes());
            out.resize(out.len() + padded - name.len(), 0);
        }
        out
    }
}

fn attr(ino: u64, kind: u32, nlink: u32, attributes: FileAttributes) -> Attr {
    let (now, now_ns) = attributes::now();
    Attr {
        ino,
        atime: now,
        mtime: now,
        ctime: now,
        atimensec: now_ns,
        mtimensec: now_ns,
        ctimensec: now_ns,
        mode: kind | attributes.mode & PERMISSIONS,
        nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        blksize: BLOCK,
        ..Attr::default()
    }
}
