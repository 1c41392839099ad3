//! From the `kvm_run` page to an [`Exit`].

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_run,
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
                || io.data_offset < size_of::<kvm_run>() as u64
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

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::{
        KVM_EXIT_EXCEPTION, KVM_EXIT_IO_IN, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_SET_TPR,
        KVM_EXIT_TPR_ACCESS, KVM_EXIT_UNKNOWN, kvm_run__bindgen_ty_1,
    };
    use kvm_ops::ExitKind;

    /// A page as the kernel would leave it.
    fn page(reason: u32, fill: impl FnOnce(&mut kvm_run__bindgen_ty_1)) -> RunPage {
        let page = RunPage::anonymous(2 * 4096);
        let run: *mut kvm_run = page.run();
        // SAFETY: nothing else uses the page, which holds a whole zeroed structure.
        unsafe {
            (*run).exit_reason = reason;
            fill(&mut (*run).__bindgen_anon_1);
        }
        page
    }

    fn exit(page: &RunPage) -> Exit<'_> {
        // SAFETY: no vCPU uses the page, and each test decodes its page once at a time.
        unsafe { decode(page) }
    }

    #[test]
    fn every_reason_has_its_kind_and_the_rest_are_unknown_with_their_number() {
        let known = [
            (KVM_EXIT_MMIO, ExitKind::MmioRead),
            (KVM_EXIT_HLT, ExitKind::Hlt),
            (KVM_EXIT_SHUTDOWN, ExitKind::Shutdown),
            (KVM_EXIT_INTR, ExitKind::Interrupted),
            (KVM_EXIT_IRQ_WINDOW_OPEN, ExitKind::IrqWindow),
            (KVM_EXIT_HYPERCALL, ExitKind::Hypercall),
            (KVM_EXIT_MEMORY_FAULT, ExitKind::MemoryFault),
            (KVM_EXIT_X86_RDMSR, ExitKind::ReadMsr),
            (KVM_EXIT_X86_WRMSR, ExitKind::WriteMsr),
            (KVM_EXIT_DEBUG, ExitKind::Debug),
            (KVM_EXIT_SYSTEM_EVENT, ExitKind::SystemEvent),
            (KVM_EXIT_FAIL_ENTRY, ExitKind::FailEntry),
            (KVM_EXIT_INTERNAL_ERROR, ExitKind::InternalError),
        ];
        for (reason, kind) in known {
            assert_eq!(exit(&page(reason, |_| {})).kind(), kind);
        }
        for reason in (0..200).chain([u32::MAX]) {
            if reason == KVM_EXIT_IO || known.iter().any(|(known, _)| *known == reason) {
                continue;
            }
            assert_eq!(exit(&page(reason, |_| {})), Exit::Unknown { reason });
        }
        for named in [
            KVM_EXIT_UNKNOWN,
            KVM_EXIT_EXCEPTION,
            KVM_EXIT_SET_TPR,
            KVM_EXIT_TPR_ACCESS,
            KVM_EXIT_IOAPIC_EOI,
        ] {
            assert!(matches!(exit(&page(named, |_| {})), Exit::Unknown { .. }));
        }
    }

    #[test]
    fn port_io_has_all_items_and_nothing_outside_the_mapping() {
        for direction in [KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT] {
            for (size, count, offset, bytes) in [
                (1, 1, 4096, Some(1)),
                (2, 3, 4096, Some(6)),
                (4, 1024, 4096, Some(4096)),
                (4, 1025, 4096, None),
                (1, 1, 8191, Some(1)),
                (2, 1, 8191, None),
                (1, 1, 8192, None),
                (1, u32::MAX, 4096, None),
                (4, 1, u64::MAX, None),
                (3, 1, 4096, None),
                (8, 1, 4096, None),
                (1, 1, 0, None),
            ] {
                let page = page(KVM_EXIT_IO, |detail| {
                    detail.io.direction = direction as u8;
                    detail.io.size = size;
                    detail.io.port = 0x3f8;
                    detail.io.count = count;
                    detail.io.data_offset = offset;
                });
                let seen = match exit(&page) {
                    Exit::IoIn { port, data, .. } if direction == KVM_EXIT_IO_IN => {
                        Some((port, data.len()))
                    }
                    Exit::IoOut { port, data, .. } if direction == KVM_EXIT_IO_OUT => {
                        Some((port, data.len()))
                    }
                    Exit::Unknown { .. } => None,
                    exit => panic!("{exit:?}"),
                };
                assert_eq!(
                    seen,
                    bytes.map(|bytes| (0x3f8, bytes)),
                    "{size}x{count}@{offset}"
                );
            }
        }
    }

    #[test]
    fn what_the_embedder_fills_in_lands_where_the_kernel_reads() {
        let page = page(KVM_EXIT_X86_RDMSR, |detail| detail.msr.index = 0x10);
        match exit(&page) {
            Exit::ReadMsr {
                index,
                value,
                error,
            } => {
                assert_eq!(index, 0x10);
                (*value, *error) = (7, 1);
            }
            exit => panic!("{exit:?}"),
        }
        // SAFETY: the exit is gone, and nothing else uses the page.
        let msr = unsafe { (*page.run()).__bindgen_anon_1.msr };
        assert_eq!((msr.data, msr.error), (7, 1));
    }

    #[test]
    fn requests_to_convert_memory_say_which_way() {
        for (attributes, to) in [(0, Privacy::Shared), (MAP_ENCRYPTED, Privacy::Private)] {
            let page = page(KVM_EXIT_HYPERCALL, |detail| {
                detail.hypercall.nr = HC_MAP_GPA_RANGE;
                detail.hypercall.args = [0x5000, 3, attributes, 0, 0, 0];
                detail.hypercall.ret = 0;
            });
            let expected = Exit::MapGpaRange {
                gpa: Gpa::new(0x5000),
                pages: 3,
                to,
                ret: &mut 0,
            };
            assert_eq!(exit(&page), expected);
        }
        for (flags, access) in [(0, Privacy::Shared), (8, Privacy::Private)] {
            let page = page(KVM_EXIT_MEMORY_FAULT, |detail| {
                detail.memory_fault.flags = flags;
                detail.memory_fault.gpa = 0x7000;
                detail.memory_fault.size = 0x1000;
            });
            let expected = Exit::MemoryFault {
                gpa: Gpa::new(0x7000),
                bytes: 0x1000,
                access,
            };
            assert_eq!(exit(&page), expected);
        }
    }

    #[test]
    fn data_longer_than_the_structure_is_cut() {
        for (ndata, seen) in [(0, 0), (1, 1), (16, 16), (17, 16), (u32::MAX, 16)] {
            let internal = page(KVM_EXIT_INTERNAL_ERROR, |detail| {
                detail.internal.ndata = ndata;
            });
            let event = page(KVM_EXIT_SYSTEM_EVENT, |detail| {
                detail.system_event.ndata = ndata;
            });
            for page in [internal, event] {
                match exit(&page) {
                    Exit::InternalError { data, .. } | Exit::SystemEvent { data, .. } => {
                        assert_eq!(data.len(), seen);
                    }
                    exit => panic!("{exit:?}"),
                }
            }
        }
        for (len, seen) in [(1, Some(1)), (8, Some(8)), (9, None), (u32::MAX, None)] {
            let page = page(KVM_EXIT_MMIO, |detail| detail.mmio.len = len);
            match exit(&page) {
                Exit::MmioRead { data, .. } => assert_eq!(Some(data.len()), seen),
                exit => assert_eq!((exit.kind(), seen), (ExitKind::Unknown, None)),
            }
        }
    }
}
