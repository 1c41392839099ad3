//! The program, as the library sees its caller.

use std::cell::Cell;
use std::sync::Arc;

use kvm_ops::HostRange;
use kvm_ops_softkvm::{
    AddressSpace, Descriptor, EventFd, Fault, File, FileKind, FileMemory, PinLimits, Process,
    RunArea,
};
use kvm_ops_uapi::Errno;
use libc::c_int;

use crate::area::Area;
use crate::own::own;
use crate::{event, files, lent, limits, memory, raw};

/// One call of the program's.
#[derive(Default)]
pub(crate) struct Caller {
    /// The file behind the run area that the call made, until its vCPU has a number.
    area: Cell<Option<c_int>>,
}

impl Process for Caller {
    fn address_space(&self) -> AddressSpace {
        AddressSpace(own().id.into())
    }

    fn read(&self, address: u64, into: &mut [u8]) -> Result<(), Fault> {
        memory::read(address, into)
    }

    fn write(&self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        memory::write(address, bytes)
    }

    fn pin_limits(&self) -> PinLimits {
        limits::of_process()
    }

    fn descriptor(&self, number: i32) -> Descriptor {
        if let Some(file) = files::get(number) {
            return Descriptor::File(file);
        }
        let args = [number as u64, libc::F_GETFD as u64, 0, 0, 0, 0];
        // SAFETY: no memory is passed.
        match unsafe { raw::syscall(libc::SYS_fcntl, args) } {
            -1 => Descriptor::Closed,
            _ => Descriptor::Foreign,
        }
    }

    fn reserve(&self) -> Result<i32, Errno> {
        raw::memfd().map_err(Errno)
    }

    fn install(&self, number: i32, file: File) {
        match file.kind() {
            FileKind::GuestMemfd => {
                raw::keep_on_exec(number);
                if let Some((size, _)) = file.guest_memfd() {
                    raw::set_len(number, size);
                }
            }
            FileKind::Vcpu => {
                if let Some(area) = self.area.take() {
                    raw::dup_onto(area, number);
                    raw::close(area);
                }
            }
            _ => {}
        }
        files::insert(number, file);
    }

    fn release(&self, number: i32) {
        raw::close(number);
    }

    fn eventfd(&self, number: i32) -> Result<Arc<dyn EventFd>, Errno> {
        event::open(number)
    }

    fn run_area(&self, other: Option<&dyn RunArea>) -> Result<Arc<dyn RunArea>, Errno> {
        let fd = raw::memfd().map_err(Errno)?;
        match Area::map(fd, other.and_then(Area::of)) {
            Some(area) => {
                self.area.set(Some(fd));
                Ok(Arc::new(area))
            }
            None => {
                raw::close(fd);
                Err(Errno::ENOMEM)
            }
        }
    }

    fn lend(&self, address: u64, bytes: u64, writable: bool) -> Option<HostRange> {
        lent::lend(address, bytes, writable)
    }

    fn lend_file(&self, number: i32, offset: u64, bytes: u64) -> Option<Arc<dyn FileMemory>> {
        lent::map(number, offset, bytes)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some(area) = self.area.take() {
            raw::close(area);
        }
    }
}
