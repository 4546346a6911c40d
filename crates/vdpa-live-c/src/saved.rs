//! Updates in which the caller carries the state: bytes and named descriptors.
#![expect(unsafe_code, reason = "functions are exported by their names, and strings are those of C programs")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Mutex;

use vdpa_client::state::Sections;
use vdpa_client::update::{Stopped, Successor};
use vdpa_client::vhost_vdpa::VhostVdpaFd;

use crate::border::{Out, answer, c_text, lock, needed, optional_text, quietly};
use crate::failure::Failure;
use crate::failure::errno::ERANGE;
use crate::log::{self, VDPA_LIVE_LOG_INFO};
use crate::plan::{Held, Places, vdpa_live_plan, with_sessions};

/// Devices that are stopped, and their state as bytes and named descriptors, for a caller that brings it to a successor itself.
#[derive(Debug)]
pub struct vdpa_live_saved {
    bytes: Vec<u8>,
    descriptors: Vec<(CString, OwnedFd)>,
    places: Places,
    /// `None` once they are rolled back or released.
    stopped: Mutex<Option<Stopped<VhostVdpaFd>>>,
}

/// Stops the devices of a plan as their strategies say (with VDPA_LIVE_LIVE they run, and nobody may drive them), and saves their
/// state. One of vdpa_live_roll_back() and vdpa_live_release() ends it; then free *saved with vdpa_live_saved_free(). On failure
/// the devices run as before.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_save(
    plan: Option<&vdpa_live_plan>,
    saved: Option<&mut MaybeUninit<*mut vdpa_live_saved>>,
) -> c_int {
    answer(|| {
        let out = Out::new(saved, "saved")?;
        let parts = lock(&needed(plan, "plan")?.0)?;
        let parts = with_sessions(&parts)?;
        let mut held = Held::new(&parts.places)?;
        let described = held.describe(parts.plan())?;
        let stopped = match described.stop(held.take()?, Sections::new()) {
            Ok(stopped) => stopped,
            Err(failed) => return Err(held.give_back(*failed)),
        };
        match stopped.parcel() {
            Ok(parcel) => {
                let named = |(name, fd): (String, OwnedFd)| (c_text(&name), fd);
                let descriptors = parcel.descriptors.into_iter().map(named).collect();
                let (bytes, places) = (parcel.bytes, parts.places.clone());
                out.put(vdpa_live_saved { bytes, descriptors, places, stopped: Mutex::new(Some(stopped)) });
                Ok(0)
            }
            Err(error) => {
                let reason = error.to_string();
                held.give_back(*stopped.roll_back(&reason, Successor::Untouched));
                Err(error.into())
            }
        }
    })
}

/// Sets *data and *size to the state. It belongs to saved. A successor gives it to vdpa_live_load().
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_saved_bytes(
    saved: Option<&vdpa_live_saved>,
    data: Option<&mut MaybeUninit<*const c_void>>,
    size: Option<&mut MaybeUninit<usize>>,
) -> c_int {
    answer(|| {
        let saved = needed(saved, "saved")?;
        let (data, size) = (needed(data, "data")?, needed(size, "size")?);
        data.write(saved.bytes.as_ptr().cast());
        size.write(saved.bytes.len());
        Ok(0)
    })
}

/// The number of descriptors.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_saved_descriptor_count(saved: Option<&vdpa_live_saved>) -> c_int {
    answer(|| Ok(c_int::try_from(needed(saved, "saved")?.descriptors.len()).unwrap_or(c_int::MAX)))
}

/// Returns descriptor number at, from 0 on, and sets *name to its name; name may be NULL. Both belong to saved. The descriptor is
/// close-on-exec. -ERANGE: there are not so many.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_saved_descriptor(
    saved: Option<&vdpa_live_saved>,
    at: usize,
    name: Option<&mut MaybeUninit<*const c_char>>,
) -> c_int {
    answer(|| {
        let all = &needed(saved, "saved")?.descriptors;
        let none = || {
            Failure::new(ERANGE, format!("there are {} descriptors, and none with number {at}", all.len()))
        };
        let (own, fd) = all.get(at).ok_or_else(none)?;
        if let Some(name) = name {
            name.write(own.as_ptr());
        }
        Ok(fd.as_raw_fd())
    })
}

fn ended() -> Failure {
    Failure::invalid("the saved devices were rolled back or released before")
}

/// Starts the devices again in this program: the sessions have them back. reason is told to the servers of the devices; it may be
/// NULL. acted is 0 when no successor has called vdpa_live_take_over(), else 1; no other process may have a descriptor of a device
/// any more, or two would drive it. -ENODEV: a device could not be started again; its session says so.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vdpa_live_roll_back(
    saved: Option<&vdpa_live_saved>,
    reason: *const c_char,
    acted: c_int,
) -> c_int {
    answer(|| {
        // SAFETY: the caller gives a string or NULL.
        let reason = unsafe { optional_text(reason, "reason") }?.unwrap_or("the caller has rolled back");
        let saved = needed(saved, "saved")?;
        let mut held = Held::new(&saved.places)?;
        let stopped = lock(&saved.stopped)?.take().ok_or_else(ended)?;
        let successor = if acted == 0 { Successor::Untouched } else { Successor::MayHaveActed };
        let failed = stopped.roll_back(reason, successor);
        let lost = !failed.lost.is_empty();
        let failure = held.give_back(*failed);
        if lost { Err(Failure { errno: crate::failure::errno::ENODEV, ..failure }) } else { Ok(0) }
    })
}

/// Leaves the devices to the successor: closes every descriptor of them here. The sessions are empty then.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_release(saved: Option<&vdpa_live_saved>) -> c_int {
    answer(|| {
        let saved = needed(saved, "saved")?;
        let mut held = Held::new(&saved.places)?;
        lock(&saved.stopped)?.take().ok_or_else(ended)?.release();
        held.leave();
        log::write(VDPA_LIVE_LOG_INFO, "released to a successor");
        Ok(0)
    })
}

/// Frees what was saved, with its descriptors. Devices that were neither rolled back nor released are released. NULL does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn vdpa_live_saved_free(saved: Option<Box<vdpa_live_saved>>) {
    quietly(|| {
        if let Some(saved) = saved
            && lock(&saved.stopped).is_ok_and(|stopped| stopped.is_some())
        {
            vdpa_live_release(Some(&saved));
        }
    });
}
