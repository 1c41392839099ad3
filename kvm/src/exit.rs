//! Decoding the `kvm_run` page to an [`Exit`], and writing answers into it.

use std::ptr;

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_run, kvm_run__bindgen_ty_1,
};
use kvm_ops::{Answer, Error, Exit, Field, Gpa, Privacy, Result, TdxRequest};
use kvm_ops_uapi::U64;
use kvm_ops_uapi::run::{SnpReqCerts, TdxExit, exit_reason};
use kvm_ops_uapi::tdx::tdvmcall;

use crate::run_page::RunPage;

/// `KVM_HC_MAP_GPA_RANGE` of `linux/kvm_para.h`: GPA, number of 4 KiB pages, attributes.
const HC_MAP_GPA_RANGE: u64 = 12;
/// `KVM_MAP_GPA_RANGE_ENCRYPTED` of the attributes.
const MAP_ENCRYPTED: u64 = 1 << 4;

/// Reads or borrows a field of the union in `kvm_run`.
macro_rules! field {
    ($($access:tt)+) => {{
        // SAFETY: every field of the union is made of integers, for which any bytes are valid, and
        // the union has the size of its largest field. The exit reason names the field that the
        // kernel filled; another one would give wrong numbers and nothing worse.
        unsafe { $($access)+ }
    }};
}

/// A structure of an exit that the bindings do not have yet, at the start of the union.
macro_rules! newer {
    ($detail:ident as $Name:ty) => {{
        const { assert!(size_of::<$Name>() <= size_of::<kvm_run__bindgen_ty_1>()) };
        let detail: *mut kvm_run__bindgen_ty_1 = &raw mut *$detail;
        // SAFETY: the structure is not longer than the union that `detail` borrows, has an alignment of 1, and is made
        // of integers, for which any bytes are valid.
        unsafe { &mut *detail.cast::<$Name>() }
    }};
}

/// The bytes of an exit: a range of the mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DataRange {
    pub(crate) offset: usize,
    pub(crate) len: usize,
}

impl DataRange {
    /// The first `len` bytes of a field of the union.
    fn of<T>(run: *const kvm_run, field: &T, len: usize) -> Self {
        Self {
            offset: ptr::from_ref(field).addr() - run.addr(),
            len,
        }
    }
}

/// Decodes the exit that the kernel left in the page, and sets the answer that holds if the embedder
/// gives none.
///
/// Lengths from the kernel are checked against the mapping, so that a kernel with a larger structure
/// shows as less data or an unknown exit, and never as an access outside of it.
///
/// # Safety
/// The caller has exclusive use of the vCPU: `KVM_RUN` is not running, and no slice of the page's
/// data is alive.
pub(crate) unsafe fn decode(page: &RunPage) -> (Exit, DataRange) {
    let run = page.run();
    // SAFETY: `run` points to a whole `kvm_run` that nothing else uses (see above).
    let reason = unsafe { (*run).exit_reason };
    // SAFETY: as above. A reference to the union covers none of the fields that other threads
    // write: `immediate_exit` lies before it.
    let detail = unsafe { &mut (*run).__bindgen_anon_1 };
    let unknown = (Exit::Unknown { reason }, DataRange::default());
    let exit = match reason {
        KVM_EXIT_IO => {
            let io = field!(detail.io);
            let bytes = u64::from(io.size) * u64::from(io.count);
            let end = io.data_offset.checked_add(bytes);
            if !matches!(io.size, 1 | 2 | 4)
                || io.data_offset < size_of::<kvm_run>() as u64
                || end.is_none_or(|end| end > page.bytes() as u64)
            {
                return unknown;
            }
            let data = DataRange {
                offset: io.data_offset as usize,
                len: bytes as usize,
            };
            let (port, size, count) = (io.port, io.size, io.count);
            return match u32::from(io.direction) {
                KVM_EXIT_IO_OUT => (Exit::IoOut { port, size, count }, data),
                _ => (Exit::IoIn { port, size, count }, data),
            };
        }
        KVM_EXIT_MMIO => {
            let mmio = field!(&detail.mmio);
            let len = match u8::try_from(mmio.len) {
                Ok(len) if usize::from(len) <= mmio.data.len() => len,
                _ => return unknown,
            };
            let gpa = Gpa::new(mmio.phys_addr);
            let exit = match mmio.is_write {
                0 => Exit::MmioRead { gpa, len },
                _ => Exit::MmioWrite { gpa, len },
            };
            return (exit, DataRange::of(run, &mmio.data, len.into()));
        }
        KVM_EXIT_SYSTEM_EVENT => {
            let event = field!(&detail.system_event);
            let data = field!(&event.__bindgen_anon_1.data);
            let len = size_of_val(data).min(event.ndata as usize * size_of::<u64>());
            let kind = event.type_;
            return (Exit::SystemEvent { kind }, DataRange::of(run, data, len));
        }
        KVM_EXIT_INTERNAL_ERROR => {
            let internal = field!(&detail.internal);
            let (suberror, data) = (internal.suberror, &internal.data);
            let len = size_of_val(data).min(internal.ndata as usize * size_of::<u64>());
            return (
                Exit::InternalError { suberror },
                DataRange::of(run, data, len),
            );
        }
        KVM_EXIT_HLT => Exit::Hlt,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_INTR => Exit::Interrupted,
        KVM_EXIT_IRQ_WINDOW_OPEN => Exit::IrqWindow,
        KVM_EXIT_HYPERCALL => {
            let call = field!(&mut detail.hypercall);
            call.ret = 0;
            let (nr, args) = (call.nr, call.args);
            match nr {
                HC_MAP_GPA_RANGE => Exit::MapGpaRange {
                    gpa: Gpa::new(args[0]),
                    pages: args[1],
                    to: privacy(args[2] & MAP_ENCRYPTED),
                },
                _ => Exit::Hypercall { nr, args },
            }
        }
        KVM_EXIT_MEMORY_FAULT => {
            let fault = field!(detail.memory_fault);
            Exit::MemoryFault {
                gpa: Gpa::new(fault.gpa),
                bytes: fault.size,
                access: privacy(fault.flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE)),
            }
        }
        exit_reason::TDX => match tdx_request(newer!(detail as TdxExit)) {
            Some(request) => Exit::Tdx(request),
            None => return unknown,
        },
        exit_reason::SNP_REQ_CERTS => {
            let certs = newer!(detail as SnpReqCerts);
            // Zero, as the kernel leaves it, would say that they were written.
            certs.ret = U64::new(libc::EIO as u64);
            Exit::SnpCertificates {
                gpa: Gpa::new(certs.gpa.get()),
                pages: certs.npages.get(),
            }
        }
        KVM_EXIT_X86_RDMSR => {
            let msr = field!(&mut detail.msr);
            (msr.data, msr.error) = (0, 0);
            Exit::ReadMsr { index: msr.index }
        }
        KVM_EXIT_X86_WRMSR => {
            let msr = field!(&mut detail.msr);
            msr.error = 0;
            Exit::WriteMsr {
                index: msr.index,
                value: msr.data,
            }
        }
        KVM_EXIT_DEBUG => {
            let debug = field!(detail.debug.arch);
            Exit::Debug {
                rip: debug.pc,
                exception: debug.exception,
            }
        }
        KVM_EXIT_FAIL_ENTRY => {
            let fail = field!(detail.fail_entry);
            Exit::FailEntry {
                reason: fail.hardware_entry_failure_reason,
                cpu: fail.cpu,
            }
        }
        _ => return unknown,
    };
    (exit, DataRange::default())
}

/// The request of a TD. `None` for one that is not known. The kernel has set the answer for an embedder that gives
/// none: what a host answers that does not offer the function.
fn tdx_request(exit: &TdxExit) -> Option<TdxRequest> {
    let word = |index: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&exit.call[8 * index..8 * index + 8]);
        u64::from_le_bytes(bytes)
    };
    Some(match exit.nr.get() {
        tdvmcall::GET_TD_VM_CALL_INFO => TdxRequest::GetTdVmCallInfo { leaf: word(1) },
        tdvmcall::GET_QUOTE => TdxRequest::GetQuote {
            gpa: Gpa::new(word(1)),
            bytes: word(2),
        },
        tdvmcall::SETUP_EVENT_NOTIFY_INTERRUPT => TdxRequest::SetupEventNotify {
            vector: u8::try_from(word(1)).ok()?,
        },
        _ => return None,
    })
}

/// The answer to a request to convert memory that the kernel takes: 0, EINVAL or EAGAIN. Any other makes KVM_RUN fail
/// (Linux 7.3).
const fn map_gpa_answer(value: u64) -> u64 {
    const EAGAIN: u64 = libc::EAGAIN as u64;
    match value {
        0 | EAGAIN => value,
        _ => libc::EINVAL as u64,
    }
}

const fn privacy(private: u64) -> Privacy {
    match private {
        0 => Privacy::Shared,
        _ => Privacy::Private,
    }
}

/// Writes the answer to the last exit where the kernel reads it.
///
/// # Errors
/// [`Error::Invalid`] with [`Field::Answer`] for an answer that does not fit the exit.
///
/// # Safety
/// As for [`decode`]; `exit` is the exit that it returned last.
pub(crate) unsafe fn answer(page: &RunPage, exit: &Exit, answer: Answer) -> Result<()> {
    if !answer.fits(exit.kind()) {
        return Err(Error::Invalid(Field::Answer, exit.kind() as u64));
    }
    // SAFETY: as in `decode`.
    let detail = unsafe { &mut (*page.run()).__bindgen_anon_1 };
    match answer {
        Answer::Value(value) => {
            field!(&mut detail.hypercall).ret = match exit {
                Exit::MapGpaRange { .. } => map_gpa_answer(value),
                _ => value,
            };
        }
        Answer::Tdx { status, values } => {
            newer!(detail as TdxExit).call[..8].copy_from_slice(&status.to_le_bytes());
            if let Exit::Tdx(TdxRequest::GetTdVmCallInfo { .. }) = exit {
                for (bytes, value) in newer!(detail as TdxExit).call[16..]
                    .chunks_mut(8)
                    .zip(values)
                {
                    bytes.copy_from_slice(&value.to_le_bytes());
                }
            }
        }
        Answer::SnpCertificates { errno, pages } => {
            let certs = newer!(detail as SnpReqCerts);
            certs.ret = U64::new(errno.into());
            if errno == libc::ENOSPC as u32 {
                certs.npages = U64::new(pages);
            }
        }
        Answer::Msr(value) => {
            let msr = field!(&mut detail.msr);
            (msr.data, msr.error) = (value, 0);
        }
        Answer::InjectGp => field!(&mut detail.msr).error = 1,
        // KVM has no other exit that is answered.
        _ => return Err(Error::Invalid(Field::Answer, exit.kind() as u64)),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::KVM_EXIT_IO_IN;
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

    fn exit(page: &RunPage) -> (Exit, DataRange) {
        // SAFETY: no vCPU uses the page, and no test keeps a slice of it.
        unsafe { decode(page) }
    }

    fn respond(page: &RunPage, exit: &Exit, with: Answer) -> Result<()> {
        // SAFETY: as above; each test passes the exit that it just decoded.
        unsafe { answer(page, exit, with) }
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
            (exit_reason::SNP_REQ_CERTS, ExitKind::SnpCertificates),
        ];
        for (reason, kind) in known {
            assert_eq!(exit(&page(reason, |_| {})).0.kind(), kind);
        }
        for reason in (0..200).chain([u32::MAX]) {
            if reason == KVM_EXIT_IO || known.iter().any(|(known, _)| *known == reason) {
                continue;
            }
            let unknown = (Exit::Unknown { reason }, DataRange::default());
            assert_eq!(exit(&page(reason, |_| {})), unknown);
        }
    }

    #[test]
    fn port_io_has_all_items_and_nothing_outside_the_mapping() {
        for direction in [KVM_EXIT_IO_IN, KVM_EXIT_IO_OUT] {
            for (size, count, offset, whole) in [
                (1, 1, 4096, true),
                (2, 3, 4096, true),
                (4, 1024, 4096, true),
                (4, 1025, 4096, false),
                (1, 1, 8191, true),
                (2, 1, 8191, false),
                (1, 1, 8192, false),
                (1, u32::MAX, 4096, false),
                (4, 1, u64::MAX, false),
                (3, 1, 4096, false),
                (8, 1, 4096, false),
                (1, 1, 0, false),
            ] {
                let page = page(KVM_EXIT_IO, |detail| {
                    detail.io.direction = direction as u8;
                    detail.io.size = size;
                    detail.io.port = 0x3f8;
                    detail.io.count = count;
                    detail.io.data_offset = offset;
                });
                let port = 0x3f8;
                let expected = match direction {
                    _ if !whole => Exit::Unknown {
                        reason: KVM_EXIT_IO,
                    },
                    KVM_EXIT_IO_IN => Exit::IoIn { port, size, count },
                    _ => Exit::IoOut { port, size, count },
                };
                let (seen, data) = exit(&page);
                assert_eq!(seen, expected, "{size}x{count}@{offset}");
                if whole {
                    assert_eq!(data.offset as u64, offset);
                    assert_eq!(data.len, usize::from(size) * count as usize);
                }
            }
        }
    }

    #[test]
    fn answers_land_where_the_kernel_reads_and_only_those_that_fit() {
        let rdmsr = page(KVM_EXIT_X86_RDMSR, |detail| {
            (detail.msr.index, detail.msr.data, detail.msr.error) = (0x10, 99, 99);
        });
        let (read, _) = exit(&rdmsr);
        assert_eq!(read, Exit::ReadMsr { index: 0x10 });
        // SAFETY: nothing else uses the page.
        let msr = || unsafe { (*rdmsr.run()).__bindgen_anon_1.msr };
        assert_eq!((msr().data, msr().error), (0, 0), "the default");
        respond(&rdmsr, &read, Answer::Msr(7)).unwrap();
        assert_eq!((msr().data, msr().error), (7, 0));
        respond(&rdmsr, &read, Answer::InjectGp).unwrap();
        assert_eq!(msr().error, 1);

        let call = page(KVM_EXIT_HYPERCALL, |detail| detail.hypercall.ret = 99);
        let (exit, _) = exit(&call);
        // SAFETY: as above.
        let ret = || unsafe { (*call.run()).__bindgen_anon_1.hypercall.ret };
        assert_eq!(ret(), 0, "the default");
        respond(&call, &exit, Answer::Value(95)).unwrap();
        assert_eq!(ret(), 95);

        let tdx = Answer::Tdx {
            status: 0,
            values: [0; 4],
        };
        for (page, exit, wrong) in [
            (&rdmsr, &read, Answer::Value(1)),
            (&call, &exit, Answer::Msr(1)),
            (&call, &exit, Answer::InjectGp),
            (&call, &exit, tdx),
            (&call, &Exit::Hlt, Answer::Value(1)),
        ] {
            let refused = Err(Error::Invalid(Field::Answer, exit.kind() as u64));
            assert_eq!(respond(page, exit, wrong), refused);
        }
    }

    /// A page with an exit that the bindings do not have, as 64-bit words of the union.
    fn newer_page(reason: u32, words: &[u64]) -> RunPage {
        page(reason, |detail| {
            // SAFETY: the words fit into the union, which is zeroed and nothing else uses.
            unsafe {
                (&raw mut *detail)
                    .cast::<u64>()
                    .copy_from_nonoverlapping(words.as_ptr(), words.len());
            }
        })
    }

    /// A 64-bit word of the union.
    fn word(page: &RunPage, index: usize) -> u64 {
        // SAFETY: inside of the page, whose union is aligned to 8 bytes and which nothing else uses.
        unsafe { page.run().byte_add(32 + 8 * index).cast::<u64>().read() }
    }

    #[test]
    fn the_requests_of_a_td_are_decoded_and_answered_at_their_places() {
        const PRESET: u64 = 0x8000_0000_0000_0003;
        let answer = Answer::Tdx {
            status: 1,
            values: [11, 12, 13, 14],
        };
        for (words, request) in [
            (
                &[0, 0x1_0000, 0, 1][..],
                TdxRequest::GetTdVmCallInfo { leaf: 1 },
            ),
            (
                &[0, 0x1_0002, PRESET, 0x8000, 0x4000],
                TdxRequest::GetQuote {
                    gpa: Gpa::new(0x8000),
                    bytes: 0x4000,
                },
            ),
            (
                &[0, 0x1_0004, PRESET, 0x41],
                TdxRequest::SetupEventNotify { vector: 0x41 },
            ),
        ] {
            let page = newer_page(exit_reason::TDX, words);
            let (seen, _) = exit(&page);
            assert_eq!(seen, Exit::Tdx(request));
            assert_eq!(word(&page, 2), words[2], "the kernel's default stays");
            respond(&page, &seen, answer).unwrap();
            assert_eq!(word(&page, 2), 1);
            let values = [4, 5, 6, 7].map(|index| word(&page, index));
            match request {
                TdxRequest::GetTdVmCallInfo { .. } => assert_eq!(values, [11, 12, 13, 14]),
                _ => assert_eq!(values[1..], [0; 3]),
            }
        }
        for words in [[0, 0x1_0001, 0, 0], [0, 0x1_0004, 0, 256]] {
            let unknown = Exit::Unknown {
                reason: exit_reason::TDX,
            };
            let page = newer_page(exit_reason::TDX, &words);
            assert_eq!(exit(&page).0, unknown);
        }
    }

    #[test]
    fn certificates_count_as_refused_until_they_are_answered_for() {
        let page = newer_page(exit_reason::SNP_REQ_CERTS, &[0x9000, 2, 0]);
        let (seen, _) = exit(&page);
        let (gpa, pages) = (Gpa::new(0x9000), 2);
        assert_eq!(seen, Exit::SnpCertificates { gpa, pages });
        assert_eq!(word(&page, 2), 5, "EIO");
        for (errno, pages, left) in [(0, 9, 2), (28, 4, 4), (11, 9, 4)] {
            respond(&page, &seen, Answer::SnpCertificates { errno, pages }).unwrap();
            assert_eq!((word(&page, 1), word(&page, 2)), (left, errno.into()));
        }
    }

    #[test]
    fn a_conversion_is_answered_as_the_kernel_takes_it() {
        let page = page(KVM_EXIT_HYPERCALL, |detail| {
            detail.hypercall.nr = HC_MAP_GPA_RANGE;
        });
        let (seen, _) = exit(&page);
        for (answer, ret) in [
            (0, 0),
            (11, 11),
            (22, 22),
            (5, 22),
            (95, 22),
            (u64::MAX, 22),
        ] {
            respond(&page, &seen, Answer::Value(answer)).unwrap();
            // SAFETY: nothing else uses the page.
            assert_eq!(unsafe { (*page.run()).__bindgen_anon_1.hypercall.ret }, ret);
        }
    }

    #[test]
    fn requests_to_convert_memory_say_which_way() {
        for (attributes, to) in [(0, Privacy::Shared), (MAP_ENCRYPTED, Privacy::Private)] {
            let page = page(KVM_EXIT_HYPERCALL, |detail| {
                detail.hypercall.nr = HC_MAP_GPA_RANGE;
                detail.hypercall.args = [0x5000, 3, attributes, 0, 0, 0];
            });
            let (gpa, pages) = (Gpa::new(0x5000), 3);
            assert_eq!(exit(&page).0, Exit::MapGpaRange { gpa, pages, to });
        }
        for (flags, access) in [(0, Privacy::Shared), (8, Privacy::Private)] {
            let page = page(KVM_EXIT_MEMORY_FAULT, |detail| {
                detail.memory_fault.flags = flags;
                detail.memory_fault.gpa = 0x7000;
                detail.memory_fault.size = 0x1000;
            });
            let (gpa, bytes) = (Gpa::new(0x7000), 0x1000);
            assert_eq!(exit(&page).0, Exit::MemoryFault { gpa, bytes, access });
        }
    }

    #[test]
    fn data_longer_than_the_structure_is_cut() {
        for (ndata, words) in [(0, 0), (1, 1), (16, 16), (17, 16), (u32::MAX, 16)] {
            let internal = page(KVM_EXIT_INTERNAL_ERROR, |detail| {
                detail.internal.ndata = ndata;
                // SAFETY: made of integers, as the page is of zeros.
                unsafe { detail.internal.data[0] = 0x1122_3344 };
            });
            let event = page(KVM_EXIT_SYSTEM_EVENT, |detail| {
                detail.system_event.ndata = ndata;
                detail.system_event.__bindgen_anon_1.data = [0x1122_3344; 16];
            });
            for page in [internal, event] {
                let (_, data) = exit(&page);
                assert_eq!(data.len, words * 8);
                if words > 0 {
                    // SAFETY: inside the page, which nothing else uses.
                    let first = unsafe { page.run().byte_add(data.offset).cast::<u64>().read() };
                    assert_eq!(first, 0x1122_3344);
                }
            }
        }
        for (len, seen) in [(1, Some(1)), (8, Some(8)), (9, None), (u32::MAX, None)] {
            let page = page(KVM_EXIT_MMIO, |detail| detail.mmio.len = len);
            match exit(&page) {
                (Exit::MmioRead { len, .. }, data) => {
                    assert_eq!((Some(len), data.len), (seen, len.into()));
                }
                (exit, _) => assert_eq!((exit.kind(), seen), (ExitKind::Unknown, None)),
            }
        }
    }
}
