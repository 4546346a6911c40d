//! A SIGSYS handler for a seccomp filter that refuses system calls with `SECCOMP_RET_TRAP`: it names the call on standard error, once
//! for each, and has it fail with `EPERM`.
//!
//! A thread that blocks SIGSYS is not served: the kernel kills the process for a call that is refused meanwhile.
#![expect(
    unsafe_code,
    reason = "a signal handler, which changes the registers of the thread that it interrupts"
)]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use syscalls::Sysno;
use vdpa_core::Errno;

use crate::errno;

/// What the line on standard error begins with.
pub const REFUSED: &str = "seccomp refuses the system call";

/// Bits for numbers of calls that were named.
static NAMED: [AtomicU64; 16] = [const { AtomicU64::new(0) }; 16];

/// Installs the handler. Programs that this process starts do not inherit it.
///
/// # Errors
/// `EOPNOTSUPP` on a processor whose registers it does not know.
pub fn name_refused() -> Result<(), Errno> {
    if cfg!(not(any(target_arch = "x86_64", target_arch = "aarch64"))) {
        return Err(Errno::OPNOTSUPP);
    }
    // SAFETY: all-zero is a valid sigaction: no flags, an empty mask, SIG_DFL.
    let mut action = unsafe { MaybeUninit::<libc::sigaction>::zeroed().assume_init() };
    action.sa_sigaction = on_sigsys as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: `action` is a valid structure, whose handler does only what a signal handler may; the former one is not asked for.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } == 0 {
        Ok(())
    } else {
        Err(errno::last())
    }
}

/// Runs on any thread in place of a system call: no locks, no allocation.
extern "C" fn on_sigsys(_signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    const SYS_SECCOMP: c_int = 1;
    // SAFETY: the kernel passes a siginfo_t to a SA_SIGINFO handler; it is valid while the handler runs.
    if unsafe { (*info).si_code } != SYS_SECCOMP {
        // Sent by a process.
        return;
    }
    // SAFETY: the kernel passes the saved registers of the interrupted thread, which it restores when the handler returns, and nobody
    // else has a reference to them.
    let number = unsafe { fail(&mut *context.cast::<libc::ucontext_t>()) };
    name(number);
}

/// Has the refused call fail with `EPERM`. Returns its number, which the kernel has left in its register.
#[cfg(target_arch = "x86_64")]
fn fail(context: &mut libc::ucontext_t) -> i64 {
    let [.., rax, _, _, _, _, _, _, _, _, _] = &mut context.uc_mcontext.gregs;
    std::mem::replace(rax, -i64::from(libc::EPERM))
}

/// As on other processors.
#[cfg(target_arch = "aarch64")]
fn fail(context: &mut libc::ucontext_t) -> i64 {
    let [x0, _, _, _, _, _, _, _, x8, ..] = &mut context.uc_mcontext.regs;
    *x0 = (-i64::from(libc::EPERM)).cast_unsigned();
    (*x8).cast_signed()
}

/// The handler is not installed there.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn fail(_: &mut libc::ucontext_t) -> i64 {
    -1
}

fn name(number: i64) {
    let known = usize::try_from(number).unwrap_or(usize::MAX);
    if let Some(word) = NAMED.get(known / 64) {
        let bit = 1 << (known % 64);
        if word.fetch_or(bit, Ordering::Relaxed) & bit != 0 {
            return;
        }
    }
    let name = Sysno::new(known).map_or("without a name", |call| call.name());
    let mut digits = [0; 20];
    let parts: [&[u8]; 6] =
        [b"vdpad: ", REFUSED.as_bytes(), b" ", name.as_bytes(), b", number ", decimal(known, &mut digits)];
    for part in parts.iter().chain([&&b"\n"[..]]) {
        // SAFETY: write reads as many bytes as the slice has; errno is of no use to a thread whose call has just failed.
        let _ = unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
}

/// Without allocation.
fn decimal(mut number: usize, digits: &mut [u8; 20]) -> &[u8] {
    let mut used = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        used += 1;
        if number == 0 {
            break;
        }
    }
    digits.get(digits.len() - used..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal() {
        let text = |number| String::from_utf8(decimal(number, &mut [0; 20]).to_vec()).unwrap();
        assert_eq!(
            (text(0), text(161), text(usize::MAX)),
            ("0".into(), "161".into(), usize::MAX.to_string())
        );
    }
}
