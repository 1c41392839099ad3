//! From the `kvm_run` page to an [`Exit`].

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_MEMORY_EXIT_FLAG_PRIVATE,
};
use kvm_ops::{Exit, Gpa, Privacy};

use crate::run_page::RunPage;

/// `KVM_HC_MAP_GPA_RANGE` of `linux/kvm_para.h`: GPA, number of 4 KiB pages, attributes.
const HC_MAP_GPA_RANGE: u64 = 12;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED` of the attributes.
const MAP_ENCRYPTED: u64 = 1 << 4;

/// Reads or borrows a field of the union in `kvm_run`.
macro_rules! field {
    ($($access:tt)+) => {{
        // SAFETY: every field of the union is made of integers, for which any bytes are valid, and
        // the union has the size of its largest. That the field is the one that the kernel filled
        // is what the exit reason says; were it not, the numbers would be wrong and nothing else.
        unsafe { $($access)+ }
    }};
}

/// Decodes the exit that the kernel left in the page.
///
/// Lengths that the kernel gives are held against the room there is, so that a kernel with a
/// larger structure shows as a shorter slice or an unknown exit and never as a read outside.
///
/// # Safety
/// The caller has exclusive use of the vCPU for `'a`: `KVM_RUN` is not running and will not be
/// before `'a` ends, and no other exit of this page is alive.
pub(crate) unsafe fn decode(page: &RunPage) -> Exit<'_> {
    let run = page.run();
    // SAFETY: `run` points to a whole `kvm_run` that nothing else uses (see above).
    let reason = unsafe { (*run).exit_reason };
    // SAFETY: as above. A reference to the union covers none of the fields that other threads
    // write: `immediate_exit` lies before it.
    let detail = unsafe { &mut (*run).__bindgen_anon_1 };
    match reason {
        KVM_EXIT_IO => {
            let io = field!(detail.io);
            let bytes = u64::from(io.size) * u64::from(io.count);
            let end = io.data_offset.checked_add(bytes);
            if !matches!(io.size, 1 | 2 | 4)
                || io.data_offset < size_of_val(detail) as u64
                || end.is_none_or(|end| end > page.bytes() as u64)
            {
                return Exit::Unknown { reason };
            }
            // SAFETY: inside the mapping, as checked; the pointer is made from the mapping's base,
            // not from the structure. The data lies in a page of its own behind the structure.
            let data = unsafe {
                let first = run.cast::<u8>().add(io.data_offset as usize);
                std::slice::from_raw_parts_mut(first, bytes as usize)
            };
            let (port, size) = (io.port, io.size);
            if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                Exit::IoOut { port, size, data }
            } else {
                Exit::IoIn { port, size, data }
            }
        }
        KVM_EXIT_MMIO => {
            let mmio = field!(&mut detail.mmio);
            let gpa = Gpa::new(mmio.phys_addr);
            let Some(data) = mmio.data.get_mut(..mmio.len as usize) else {
                return Exit::Unknown { reason };
            };
            if mmio.is_write != 0 {
                Exit::MmioWrite { gpa, data }
            } else {
                Exit::MmioRead { gpa, data }
            }
        }
        KVM_EXIT_HLT => Exit::Hlt,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_IRQ_WINDOW_OPEN => Exit::IrqWindow,
        KVM_EXIT_HYPERCALL => {
            let call = field!(&mut detail.hypercall);
            let ret = &mut call.ret;
            if call.nr != HC_MAP_GPA_RANGE {
                return Exit::Hypercall {
                    nr: call.nr,
                    args: call.args,
                    ret,
                };
            }
            Exit::MapGpaRange {
                gpa: Gpa::new(call.args[0]),
                pages: call.args[1],
                to: if call.args[2] & MAP_ENCRYPTED != 0 {
                    Privacy::Private
                } else {
                    Privacy::Shared
                },
                ret,
            }
        }
        KVM_EXIT_MEMORY_FAULT => {
            let fault = field!(detail.memory_fault);
            Exit::MemoryFault {
                gpa: Gpa::new(fault.gpa),
                bytes: fault.size,
                access: if fault.flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0 {
                    Privacy::Private
                } else {
                    Privacy::Shared
                },
            }
        }
        KVM_EXIT_X86_RDMSR => {
            let msr = field!(&mut detail.msr);
            Exit::ReadMsr {
                index: msr.index,
                value: &mut msr.data,
                error: &mut msr.error,
            }
        }
        KVM_EXIT_X86_WRMSR => {
            let msr = field!(&mut detail.msr);
            Exit::WriteMsr {
                index: msr.index,
                value: msr.data,
                error: &mut msr.error,
            }
        }
        KVM_EXIT_DEBUG => {
            let debug = field!(detail.debug.arch);
            Exit::Debug {
                rip: debug.pc,
                exception: debug.exception,
            }
        }
        KVM_EXIT_SYSTEM_EVENT => {
            let event = field!(&detail.system_event);
            let data = field!(&event.__bindgen_anon_1.data);
            Exit::SystemEvent {
                kind: event.type_,
                data: &data[..data.len().min(event.ndata as usize)],
            }
        }
        KVM_EXIT_FAIL_ENTRY => {
            let fail = field!(detail.fail_entry);
            Exit::FailEntry {
                reason: fail.hardware_entry_failure_reason,
                cpu: fail.cpu,
            }
        }
        KVM_EXIT_INTERNAL_ERROR => {
            let internal = field!(&detail.internal);
            let room = internal.data.len();
            Exit::InternalError {
                suberror: internal.suberror,
                data: &internal.data[..room.min(internal.ndata as usize)],
            }
        }
        reason => Exit::Unknown { reason },
    }
}
