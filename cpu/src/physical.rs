//! Guest-physical accesses: frames by pointer, devices through the bus.

use alloc::boxed::Box;
use alloc::vec;
use core::ptr::NonNull;

use crate::bus::{Access, Frame, Mapping};
use crate::exit::{Cause, Exit};
use crate::host;
use crate::state::{Core, Pending, R, Stop};

/// A guest-physical page as the processor reaches it.
#[derive(Clone, Copy)]
pub(crate) enum Place {
    Host {
        host: NonNull<u8>,
        writable: bool,
    },
    Device,
    /// The local APIC's registers.
    Apic,
}

const FRAMES: usize = 2048;

/// A frame, and the kind of access for which the bus lent it: some buses answer code and page walks otherwise than data.
#[derive(Clone, Copy)]
struct CachedFrame {
    gpa: u64,
    execute: bool,
    walk: bool,
    wide: bool,
    host: NonNull<u8>,
    writable: bool,
}

/// The frames that were used last. The processor keeps them over flushes of its TLB, until the bus takes one back.
pub(crate) struct FrameCache(Box<[Option<CachedFrame>]>);

impl FrameCache {
    pub(crate) fn new() -> Self {
        Self(vec![None; FRAMES].into_boxed_slice())
    }

    pub(crate) fn flush(&mut self) {
        self.0.fill(None);
    }

    /// The entry of a page. Data, code and tables of one page have three.
    fn entry(&mut self, gpa: u64, access: Access) -> &mut Option<CachedFrame> {
        let kind = u64::from(access.execute) << 9 | u64::from(access.walk) << 10;
        &mut self.0[((gpa >> 12) ^ kind) as usize % FRAMES]
    }

    /// The frame of a page, if it is here for such an access.
    fn get(&mut self, gpa: u64, access: Access) -> Option<Place> {
        let kind = (access.execute, access.walk, access.wide);
        self.entry(gpa, access)
            .filter(|f| f.gpa == gpa && (f.execute, f.walk, f.wide) == kind)
            .filter(|f| f.writable || !access.write)
            .map(|f| Place::Host {
                host: f.host,
                writable: f.writable,
            })
    }

    /// Keeps a frame that the bus lent.
    fn fill(&mut self, gpa: u64, access: Access, frame: Frame) {
        *self.entry(gpa, access) = Some(CachedFrame {
            gpa,
            execute: access.execute,
            walk: access.walk,
            wide: access.wide,
            host: frame.host,
            writable: frame.writable,
        });
    }
}

const FETCHES: usize = 256;

#[derive(Clone, Copy)]
struct Fetch {
    linear: u64,
    user: bool,
    gpa: u64,
}

/// Linear pages from which instructions were fetched, with their guest-physical page.
pub(crate) struct FetchCache([Option<Fetch>; FETCHES]);

impl FetchCache {
    pub(crate) fn new() -> Self {
        Self([None; FETCHES])
    }

    pub(crate) fn flush(&mut self) {
        self.0.fill(None);
    }

    pub(crate) fn get(&self, linear: u64, user: bool) -> Option<u64> {
        let page = linear & !0xfff;
        self.0[(linear >> 12) as usize % FETCHES]
            .filter(|f| f.linear == page && f.user == user)
            .map(|f| f.gpa | linear & 0xfff)
    }

    pub(crate) fn fill(&mut self, linear: u64, user: bool, gpa: u64) {
        self.0[(linear >> 12) as usize % FETCHES] = Some(Fetch {
            linear: linear & !0xfff,
            user,
            gpa: gpa & !0xfff,
        });
    }
}

// SAFETY: the pointers come from frames whose maker allows access from wherever the processor and
// its bus are; `Bus` is `Send`, and nothing here is shared between threads.
unsafe impl Send for Place {}
// SAFETY: as for `Place`.
unsafe impl Send for FrameCache {}

impl Core {
    /// Finds a page, and asks the bus for it unless it lent it before. A refusal becomes an exit.
    pub(crate) fn place(&mut self, gpa: u64, access: Access, linear: Option<u64>) -> R<Place> {
        let page = gpa & !0xfff;
        if self.apic.page() == Some(page) && !self.controls.apic_page {
            return Ok(Place::Apic);
        }
        if let Some(place) = self.frames.get(page, access) {
            return Ok(place);
        }
        match self.bus.map(page, access) {
            Mapping::Frame(f) => {
                debug_assert!(
                    f.host.addr().get().is_multiple_of(8),
                    "`Frame::new`'s caller"
                );
                self.frames.fill(page, access, f);
                Ok(Place::Host {
                    host: f.host,
                    writable: f.writable,
                })
            }
            Mapping::Device => Ok(Place::Device),
            Mapping::Refused { code } => Err(self.violation(gpa, access, linear, code)),
        }
    }

    #[cold]
    pub(crate) fn violation(
        &mut self,
        gpa: u64,
        access: Access,
        linear: Option<u64>,
        code: u64,
    ) -> Stop {
        let Access {
            write,
            execute,
            walk,
            ..
        } = access;
        self.pending = Pending::Exit(Exit {
            cause: Cause::Violation {
                write,
                execute,
                walk,
                code,
            },
            len: 0,
            linear,
            physical: Some(gpa),
            vectoring: self.vectoring,
        });
        Stop
    }

    fn walk_frame(&mut self, gpa: u64, write: bool, linear: u64) -> R<Option<NonNull<u8>>> {
        let access = Access {
            write,
            execute: false,
            walk: true,
            wide: self.has_wide_entries(),
        };
        Ok(match self.place(gpa, access, Some(linear))? {
            Place::Host { host, writable } if writable || !write => Some(host),
            _ => None,
        })
    }

    /// Reads a paging-structure entry of 4 or 8 bytes, naturally aligned.
    pub(crate) fn read_entry(&mut self, gpa: u64, size: u32, linear: u64) -> R<u64> {
        if let Some(host) = self.walk_frame(gpa, false, linear)? {
            let at = host.as_ptr().wrapping_add(gpa as usize & 0xfff);
            // SAFETY: the entry is aligned, so it is inside of the frame that was just looked up;
            // the frame is readable (`Frame::new`).
            return Ok(unsafe { host::load_sized(at, size as usize) });
        }
        let mut data = [0; 8];
        if self.bus.read(gpa, &mut data[..size as usize]) {
            Ok(u64::from_le_bytes(data))
        } else {
            let access = Access {
                write: false,
                execute: false,
                walk: true,
                wide: self.has_wide_entries(),
            };
            Err(self.violation(gpa, access, Some(linear), 0))
        }
    }

    /// Replaces a paging-structure entry: accessed and dirty bits. False if it is not `old` any more.
    pub(crate) fn update_entry(
        &mut self,
        gpa: u64,
        size: u32,
        old: u64,
        new: u64,
        linear: u64,
    ) -> R<bool> {
        if let Some(host) = self.walk_frame(gpa, true, linear)? {
            let at = host.as_ptr().wrapping_add(gpa as usize & 0xfff);
            // SAFETY: as in `read_entry`; `walk_frame` returns writable frames for writes only.
            return Ok(unsafe { host::exchange(at, size as usize, old, new) });
        }
        if self.bus.write(gpa, &new.to_le_bytes()[..size as usize]) {
            Ok(true)
        } else {
            let access = Access {
                write: true,
                execute: false,
                walk: true,
                wide: self.has_wide_entries(),
            };
            Err(self.violation(gpa, access, Some(linear), 0))
        }
    }

    /// Copies `data.len()` bytes out of one page.
    pub(crate) fn copy_out(&mut self, place: Place, gpa: u64, data: &mut [u8]) -> bool {
        match place {
            Place::Host { host, .. } => {
                let offset = gpa as usize & 0xfff;
                let len = data.len().min(4096 - offset);
                let at = host.as_ptr().wrapping_add(offset);
                // SAFETY: `offset + len` is at most 4096, the size of the readable frame; `data`
                // is an exclusive Rust buffer, which no frame overlaps (`Frame::new`).
                unsafe { host::read(at, &mut data[..len]) };
                true
            }
            Place::Device => {
                // The device may have written memory, or have an interrupt.
                self.attention = true;
                self.bus.read(gpa, data)
            }
            Place::Apic => {
                let now = self.now();
                self.apic.read_page(gpa as usize & 0xfff, data, now);
                true
            }
        }
    }

    /// Copies `data` into one page whose frame is writable.
    pub(crate) fn copy_in(&mut self, place: Place, gpa: u64, data: &[u8]) -> bool {
        match place {
            Place::Host {
                host,
                writable: true,
            } => {
                let offset = gpa as usize & 0xfff;
                let len = data.len().min(4096 - offset);
                let at = host.as_ptr().wrapping_add(offset);
                // SAFETY: as in `copy_out`, and the frame is writable.
                unsafe { host::write(at, &data[..len]) };
                true
            }
            Place::Apic => {
                let now = self.now();
                self.attention = true;
                let effect = self.apic.write_page(gpa as usize & 0xfff, data, now);
                self.apply(effect);
                true
            }
            _ => {
                self.attention = true;
                self.bus.write(gpa, data)
            }
        }
    }
}
