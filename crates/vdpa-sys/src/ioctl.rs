//! Typed ioctls: the number and the type of its argument are bound once, call sites are safe.
//!
//! ```
//! use vdpa_sys::ioctl::{Direction, direction, ior, size};
//!
//! const VHOST_GET_FEATURES: u32 = ior::<u64>(0xaf, 0x00);
//! assert_eq!(VHOST_GET_FEATURES, 0x8008_af00);
//! assert_eq!((direction(VHOST_GET_FEATURES), size(VHOST_GET_FEATURES)), (Direction::Read, 8));
//! ```
#![expect(unsafe_code, reason = "ioctl(2) reads and writes through a pointer that only its number explains")]

use std::ffi::c_int;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use vdpa_core::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::errno;

const SIZE_BITS: u32 = 14;

/// Which way the argument of an ioctl goes, seen from the caller (uapi/asm-generic/ioctl.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// `_IO`: no argument, or an integer in its place.
    None,
    /// `_IOW`: the kernel reads.
    Write,
    /// `_IOR`: the kernel writes.
    Read,
    /// `_IOWR`: the kernel reads, then writes.
    ReadWrite,
}

impl Direction {
    const fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Write => 1,
            Self::Read => 2,
            Self::ReadWrite => 3,
        }
    }
}

const fn encode(direction: Direction, kind: u8, nr: u8, size: usize) -> u32 {
    assert!(size < 1 << SIZE_BITS, "the argument of an ioctl is smaller than 16 KiB");
    #[expect(clippy::cast_possible_truncation, reason = "checked above")]
    let size = size as u32;
    direction.bits() << 30 | size << 16 | (kind as u32) << 8 | nr as u32
}

/// `_IO(kind, nr)`.
#[must_use]
pub const fn io(kind: u8, nr: u8) -> u32 {
    encode(Direction::None, kind, nr, 0)
}

/// `_IOR(kind, nr, T)`.
#[must_use]
pub const fn ior<T>(kind: u8, nr: u8) -> u32 {
    encode(Direction::Read, kind, nr, size_of::<T>())
}

/// `_IOW(kind, nr, T)`.
#[must_use]
pub const fn iow<T>(kind: u8, nr: u8) -> u32 {
    encode(Direction::Write, kind, nr, size_of::<T>())
}

/// `_IOWR(kind, nr, T)`.
#[must_use]
pub const fn iowr<T>(kind: u8, nr: u8) -> u32 {
    encode(Direction::ReadWrite, kind, nr, size_of::<T>())
}

/// `_IOC_DIR`.
#[must_use]
pub const fn direction(opcode: u32) -> Direction {
    match opcode >> 30 {
        0 => Direction::None,
        1 => Direction::Write,
        2 => Direction::Read,
        _ => Direction::ReadWrite,
    }
}

/// `_IOC_SIZE`: bytes of the argument.
#[must_use]
pub const fn size(opcode: u32) -> usize {
    (opcode >> 16 & ((1 << SIZE_BITS) - 1)) as usize
}

const fn assert_argument<T>(opcode: u32, expected: Direction) {
    assert!(
        direction(opcode).bits() == expected.bits(),
        "the direction in the number is not that of the request"
    );
    assert!(size(opcode) == size_of::<T>(), "the size in the number is not that of the argument");
}

/// An ioctl with which the kernel fills a `T`.
#[derive(Debug)]
pub struct Getter<T> {
    opcode: u32,
    argument: PhantomData<fn() -> T>,
}

/// An ioctl with which the kernel reads a `T`.
#[derive(Debug)]
pub struct Setter<T> {
    opcode: u32,
    argument: PhantomData<fn(T)>,
}

/// An ioctl with which the kernel reads a `T` and replaces it.
#[derive(Debug)]
pub struct Updater<T> {
    opcode: u32,
    argument: PhantomData<fn(T) -> T>,
}

/// An ioctl without an argument.
#[derive(Debug)]
pub struct NoArg {
    opcode: u32,
}

impl<T: FromBytes + IntoBytes> Getter<T> {
    /// Binds `opcode` to `T`. Used in a const item, a wrong direction or size does not compile.
    ///
    /// # Safety
    /// Every driver that knows `opcode` writes at most `size_of::<T>()` bytes at the argument and touches no
    /// other memory of the caller.
    #[must_use]
    pub const unsafe fn new(opcode: u32) -> Self {
        assert_argument::<T>(opcode, Direction::Read);
        Self { opcode, argument: PhantomData }
    }

    /// Performs it. What the kernel does not write stays zero.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn get(&self, fd: impl AsFd) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        // SAFETY: `value` is a live T, and by the contract of `new` no more than its bytes are written; any
        // bytes are a valid T (FromBytes).
        unsafe { call(fd, self.opcode, (&raw mut value) as usize) }?;
        Ok(value)
    }
}

impl<T: IntoBytes + Immutable> Setter<T> {
    /// Binds `opcode` to `T`. Used in a const item, a wrong direction or size does not compile.
    ///
    /// # Safety
    /// Every driver that knows `opcode` only reads `size_of::<T>()` bytes at the argument and touches no other
    /// memory of the caller.
    #[must_use]
    pub const unsafe fn new(opcode: u32) -> Self {
        assert_argument::<T>(opcode, Direction::Write);
        Self { opcode, argument: PhantomData }
    }

    /// Performs it.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn set(&self, fd: impl AsFd, value: &T) -> Result<(), Errno> {
        // SAFETY: `value` is a live T without padding (IntoBytes), and by the contract of `new` it is only read.
        unsafe { call(fd, self.opcode, (&raw const *value) as usize) }.map(drop)
    }
}

impl<T: FromBytes + IntoBytes> Updater<T> {
    /// Binds `opcode` to `T`. Used in a const item, a wrong direction or size does not compile.
    ///
    /// # Safety
    /// Every driver that knows `opcode` reads and writes at most `size_of::<T>()` bytes at the argument and
    /// touches no other memory of the caller, except where `T` holds addresses that the caller of
    /// [`update`](Self::update) has set to memory it may.
    #[must_use]
    pub const unsafe fn new(opcode: u32) -> Self {
        assert_argument::<T>(opcode, Direction::ReadWrite);
        Self { opcode, argument: PhantomData }
    }

    /// Performs it.
    ///
    /// # Errors
    /// What the driver reports; `value` may have been changed all the same.
    pub fn update(&self, fd: impl AsFd, value: &mut T) -> Result<(), Errno> {
        // SAFETY: `value` is a live T, and by the contract of `new` no more than its bytes are accessed; any
        // bytes are a valid T (FromBytes).
        unsafe { call(fd, self.opcode, (&raw mut *value) as usize) }.map(drop)
    }
}

impl NoArg {
    /// Binds `opcode` to a call without an argument. Used in a const item, a wrong direction does not compile.
    ///
    /// # Safety
    /// No driver that knows `opcode` touches memory of the caller when the argument is 0.
    #[must_use]
    pub const unsafe fn new(opcode: u32) -> Self {
        assert!(
            direction(opcode).bits() == 0 && size(opcode) == 0,
            "the number belongs to a request with an argument"
        );
        Self { opcode }
    }

    /// Performs it.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn call(&self, fd: impl AsFd) -> Result<(), Errno> {
        // SAFETY: by the contract of `new` no memory is accessed.
        unsafe { call(fd, self.opcode, 0) }.map(drop)
    }
}

/// A request in the type that the C library has for it: unsigned long in glibc, int in musl. The kernel looks at 32 bits.
#[cfg(not(target_env = "musl"))]
pub(crate) fn request(opcode: u32) -> libc::Ioctl {
    opcode.into()
}

/// A request in the type that the C library has for it: unsigned long in glibc, int in musl. The kernel looks at 32 bits.
#[cfg(target_env = "musl")]
pub(crate) fn request(opcode: u32) -> libc::Ioctl {
    opcode.cast_signed()
}

/// `ioctl(fd, opcode, argument)`, repeated on `EINTR`; returns the value of the call.
///
/// # Safety
/// The memory that the driver behind `fd` accesses for `opcode`, at `argument` or from there, is the caller's to
/// give.
pub(crate) unsafe fn call(fd: impl AsFd, opcode: u32, argument: usize) -> Result<c_int, Errno> {
    loop {
        // SAFETY: the descriptor is borrowed for the call; the rest is the contract of this function.
        let value = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request(opcode), argument) };
        if value >= 0 {
            return Ok(value);
        }
        match errno::last() {
            Errno::INTR => {}
            error => return Err(error),
        }
    }
}
