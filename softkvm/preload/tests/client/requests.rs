//! What confidential guests ask of their host: a guest of machine code leaves by the same exits, and gets the same answers,
//! whether the kernel holds it or the software platform.

use iced_x86::code_asm::*;
use kvm_ops::kvm::KvmHost;
use kvm_ops::sim::SimHost;
use kvm_ops::{
    Answer, AnyVcpu, AnyVm, EncCmd, EncParams, Exit, Gfn, Gpa, Gpaw, Host, HostRange, InitialPage,
    InitialPageKind, Kind, MemSlot, Privacy, Regs, Segment, SlotId, TdParams, TdxRequest, Tech,
    VcpuId, VcpuOps, Vendor, Vm, VmConfig, create,
};
use kvm_ops_uapi::run::system_event;
use kvm_ops_uapi::sev::SNP_ENABLE_REQ_CERTS;
use kvm_ops_uapi::tdx::tdvmcall_status;
use vm_memory::MmapRegion;

use crate::common::again;
use crate::guest::host;

#[path = "../../../tests/common/sev_code.rs"]
mod sev_code;
#[path = "../../../tests/common/td_code.rs"]
mod td_code;

const PAGE: u64 = 4096;
const EAGAIN: u64 = libc::EAGAIN as u64;

/// A guest with one vCPU. Its memory is the last to go.
struct Guest<H: Host> {
    vcpu: AnyVcpu<H>,
    vm: Vm<AnyVm<H>>,
    memory: MmapRegion<()>,
    start: u64,
}

impl<H: Host> Guest<H> {
    fn prepared(
        host: &H,
        config: &VmConfig,
        (start, bytes): (u64, u64),
        prepare: impl FnOnce(&mut Vm<AnyVm<H>>),
    ) -> Self {
        let mut vm = create(host, config).unwrap();
        prepare(&mut vm);
        let memory = MmapRegion::new(bytes as usize).unwrap();
        // SAFETY: the region stays mapped until the VM is gone, and nothing references its contents.
        let range = unsafe { HostRange::new(memory.as_ptr() as u64, bytes) };
        let slot = MemSlot::new(SlotId(0), Gpa::new(start), range.unwrap());
        vm.set_memory_slot(slot).unwrap();
        Self {
            vcpu: vm.create_vcpu(VcpuId(0)).unwrap(),
            vm,
            memory,
            start,
        }
    }

    fn launch(&mut self, first: u64, image: &[u8]) {
        for (gpa, contents) in (first..).step_by(PAGE as usize).zip(image.chunks(4096)) {
            self.vm
                .add_initial_page(&InitialPage {
                    gpa: Gpa::new(gpa),
                    contents: contents.try_into().unwrap(),
                    kind: InitialPageKind::Measured,
                })
                .unwrap();
        }
        self.vm.finalize().unwrap();
    }

    fn convert(&self, gpa: u64, pages: u64, to: Privacy) {
        let done = self
            .vm
            .set_memory_attributes(Gfn::new(gpa / PAGE), pages, to);
        assert_eq!(done, Ok(pages));
    }

    fn runs_to(&mut self, exit: Exit) {
        assert_eq!(self.vcpu.vcpu_run(), Ok(exit));
    }

    fn answer(&mut self, answer: Answer) {
        self.vcpu.answer(answer).unwrap();
    }

    /// The next 32 bits that the guest writes to a port.
    fn says(&mut self, port: u16) -> u32 {
        let (size, count) = (4, 1);
        self.runs_to(Exit::IoOut { port, size, count });
        u32::from_le_bytes(self.vcpu.exit_data().try_into().unwrap())
    }

    /// The first number of a page, as the host sees it.
    fn shared(&self, gpa: u64) -> u64 {
        // SAFETY: the page is mapped, and the guest does not run.
        unsafe {
            self.memory
                .as_ptr()
                .add((gpa - self.start) as usize)
                .cast::<u64>()
                .read_volatile()
        }
    }

    fn ends(self) {
        drop(self.vcpu);
        assert!(self.vm.destroy().is_clean());
    }
}

/// Memory of a TD in front of what starts it: private, and not accepted.
const BUFFER: u64 = td_code::TOP - 16 * PAGE;

fn td<H: Host>(host: &H, code: td_code::Part) -> Guest<H> {
    let params = TdParams {
        gpaw: Gpaw::Bits48,
        ..TdParams::default()
    };
    let config = VmConfig::new(Kind::Of(Tech::Tdx)).enc(EncParams::Td(Box::new(params)));
    let memory = (BUFFER, (1 << 32) - BUFFER);
    let mut td = Guest::prepared(host, &config, memory, |_| ());
    td.launch(td_code::TOP, &td_code::image(code));
    td
}

impl<H: Host> Guest<H> {
    /// The next 64 bits that a TD says.
    fn tells(&mut self) -> u64 {
        let [low, high] = [(), ()].map(|()| u64::from(self.says(td_code::SAY)));
        high << 32 | low
    }
}

/// Runs a check on the platform that the kernel's commands reach, and on one of this process.
fn on_both(test: &str, vendor: (&str, Vendor), kernel: fn(&KvmHost), own: fn(&SimHost)) {
    if again(test, vendor.0).is_none() {
        kernel(&host());
        own(&SimHost::new(vendor.1));
    }
}

const INTEL: (&str, Vendor) = ("intel", Vendor::Intel);
const AMD: (&str, Vendor) = ("amd", Vendor::Amd);

#[test]
fn a_tds_request_for_a_quote_gets_the_hosts_answer() {
    let test = "requests::a_tds_request_for_a_quote_gets_the_hosts_answer";
    on_both(test, INTEL, quote, quote);
}

fn quote<H: Host>(host: &H) {
    use td_code::*;
    const BYTES: u64 = 2 * PAGE;
    let mut td = td(host, |a| {
        for _ in 0..3 {
            call(a, GET_QUOTE, [SHARED | BUFFER, BYTES, 0, 0])?;
            say(a, r10)?;
        }
        // A buffer that is private is no question to the host.
        call(a, GET_QUOTE, [BUFFER, BYTES, 0, 0])?;
        say(a, r10)
    });
    for (answer, status) in [
        (None, tdvmcall_status::SUBFUNC_UNSUPPORTED),
        (Some(tdvmcall_status::RETRY), tdvmcall_status::RETRY),
        (Some(tdvmcall_status::SUCCESS), tdvmcall_status::SUCCESS),
    ] {
        td.runs_to(Exit::Tdx(TdxRequest::GetQuote {
            gpa: Gpa::new(BUFFER),
            bytes: BYTES,
        }));
        if let Some(status) = answer {
            let values = [0; 4];
            td.answer(Answer::Tdx { status, values });
        }
        assert_eq!(td.tells(), status);
    }
    assert_eq!(td.tells(), tdvmcall_status::INVALID_OPERAND);
    td.ends();
}

#[test]
fn a_td_learns_what_its_host_offers_and_names_a_vector_for_events() {
    let test = "requests::a_td_learns_what_its_host_offers_and_names_a_vector_for_events";
    on_both(test, INTEL, offers, offers);
}

fn offers<H: Host>(host: &H) {
    use td_code::*;
    let mut td = td(host, |a| {
        call(a, INFO, [1, 0, 0, 0])?;
        a.mov(rbx, r11)?;
        a.add(rbx, r12)?;
        say_rbx(a)?;
        for vector in [0x60, 31] {
            call(a, EVENT_NOTIFY, [vector, 0, 0, 0])?;
            say(a, r10)?;
        }
        Ok(())
    });
    td.runs_to(Exit::Tdx(TdxRequest::GetTdVmCallInfo { leaf: 1 }));
    td.answer(Answer::Tdx {
        status: tdvmcall_status::SUCCESS,
        values: [0x1_0000_0000, 7, 0, 0],
    });
    assert_eq!(td.tells(), 0x1_0000_0007);
    td.runs_to(Exit::Tdx(TdxRequest::SetupEventNotify { vector: 0x60 }));
    td.answer(Answer::Tdx {
        status: tdvmcall_status::SUCCESS,
        values: [0; 4],
    });
    assert_eq!(td.tells(), tdvmcall_status::SUCCESS);
    // Vectors of exceptions are nobody's.
    assert_eq!(td.tells(), tdvmcall_status::INVALID_OPERAND);
    td.ends();
}

#[test]
fn a_tds_memory_becomes_shared_and_private_again() {
    let test = "requests::a_tds_memory_becomes_shared_and_private_again";
    on_both(test, INTEL, conversions, conversions);
}

fn conversions<H: Host>(host: &H) {
    use td_code::*;
    const WRITTEN: u64 = 0x7465_6c6c_696d_6521;
    let mut td = td(host, |a| {
        for _ in 0..2 {
            call(a, MAP_GPA, [SHARED | BUFFER, PAGE, 0, 0])?;
            say(a, r10)?;
        }
        a.mov(rdi, SHARED_VIEW | BUFFER)?;
        a.mov(rbx, WRITTEN)?;
        a.mov(qword_ptr(rdi), rbx)?;
        call(a, MAP_GPA, [BUFFER, PAGE, 0, 0])?;
        say(a, r10)?;
        accept(a, BUFFER)?;
        a.mov(rdi, BUFFER)?;
        a.mov(rbx, qword_ptr(rdi))?;
        say_rbx(a)
    });
    let asks = |to| Exit::MapGpaRange {
        gpa: Gpa::new(BUFFER),
        pages: 1,
        to,
    };
    td.runs_to(asks(Privacy::Shared));
    td.answer(Answer::Value(EAGAIN));
    assert_eq!(td.tells(), tdvmcall_status::RETRY);
    td.runs_to(asks(Privacy::Shared));
    td.convert(BUFFER, 1, Privacy::Shared);
    td.answer(Answer::Value(0));
    assert_eq!(td.tells(), tdvmcall_status::SUCCESS);
    td.runs_to(asks(Privacy::Private));
    assert_eq!(td.shared(BUFFER), WRITTEN);
    td.convert(BUFFER, 1, Privacy::Private);
    td.answer(Answer::Value(0));
    assert_eq!(td.tells(), tdvmcall_status::SUCCESS);
    assert_eq!(td.tells(), 0, "an accepted page is empty");
    td.ends();
}

#[test]
fn a_tds_fatal_error_is_an_event_with_the_registers_that_it_passes() {
    let test = "requests::a_tds_fatal_error_is_an_event_with_the_registers_that_it_passes";
    on_both(test, INTEL, fatal_error, fatal_error);
}

fn fatal_error<H: Host>(host: &H) {
    use td_code::*;
    let mut td = td(host, |a| {
        a.mov(rsi, 0x6965u64)?;
        call(a, FATAL, [0xbad, 1, 2, 3])
    });
    td.runs_to(Exit::SystemEvent {
        kind: system_event::TDX_FATAL,
    });
    let data = td.vcpu.exit_data().to_vec();
    let register = |n: usize| u64::from_le_bytes(data[8 * n..8 * n + 8].try_into().unwrap());
    assert_eq!(data.len(), 16 * 8);
    assert_eq!(register(6), 0, "RSI is not among those that it passes");
    let call = [10, 11, 12, 13, 14, 15].map(register);
    assert_eq!(call, [0, u64::from(FATAL), 0xbad, 1, 2, 3], "R10 to R15");
    td.ends();
}

/// An SNP guest in long mode, whose memory from `OPEN` on is shared, and whose host `asks` for certificates or not.
fn snp<H: Host>(host: &H, code: sev_code::Part, asks: bool) -> Guest<H> {
    use sev_code::*;
    let config = VmConfig::new(Kind::Of(Tech::SevSnp)).enc(EncParams::Sev(Box::default()));
    let mut snp = Guest::prepared(host, &config, (0, RAM), |vm| {
        if asks {
            let mut on = EncCmd {
                id: SNP_ENABLE_REQ_CERTS,
                flags: 0,
                data: &mut [],
                firmware_status: 0,
            };
            vm.mem_enc_op(&mut on).unwrap();
        }
    });
    start_long(&mut snp.vcpu);
    let c_bit = snp.vm.shared_mask().bits();
    snp.launch(0, &image(c_bit.trailing_zeros(), code));
    snp.convert(OPEN, (RAM - OPEN) / PAGE, Privacy::Shared);
    snp
}

/// The registers of the first instruction.
fn start_long<V: VcpuOps>(vcpu: &mut V) {
    use sev_code::{CODE, STACK, TABLES};
    let data = Segment {
        limit: u32::MAX,
        kind: 3,
        present: true,
        s: true,
        g: true,
        db: true,
        ..Segment::default()
    };
    let mut sregs = vcpu.sregs().unwrap();
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cs = Segment {
        kind: 11,
        l: true,
        db: false,
        ..data
    };
    sregs.idt.limit = 0;
    sregs.cr0 = 0x8000_0021;
    sregs.cr3 = TABLES;
    sregs.cr4 = 0x620; // PAE, SSE
    sregs.efer = 0x500;
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&Regs {
        rip: CODE,
        rsp: STACK,
        rflags: 2,
        ..Regs::default()
    })
    .unwrap();
}

#[test]
fn an_snp_guests_page_state_change_gets_the_hosts_answer() {
    let test = "requests::an_snp_guests_page_state_change_gets_the_hosts_answer";
    on_both(test, AMD, page_state, page_state);
}

fn page_state<H: Host>(host: &H) {
    use sev_code::*;
    /// The page, and the upper half of the answer to a change that failed.
    const AT: u64 = OPEN + 8 * PAGE;
    const PSC_ERROR: u32 = 1 << 31;
    let mut snp = snp(
        host,
        |a| {
            for _ in 0..2 {
                // To private, by the GHCB MSR.
                msr_request(a, 1 << 52 | AT | 0x014)?;
                a.mov(r13, rbx)?;
                use_page(a, true)?;
                a.mov(rbx, r13)?;
                a.shr(rbx, 32)?;
                say_by_page(a, rbx)?;
            }
            // PVALIDATE of 4 KiB.
            a.mov(rax, AT)?;
            a.xor(ecx, ecx)?;
            a.mov(edx, 1)?;
            a.pvalidate()?;
            a.mov(rbx, AT)?;
            a.mov(dword_ptr(rbx), 0x77)?;
            a.mov(r12d, dword_ptr(rbx))?;
            say_by_page(a, r12)
        },
        false,
    );
    for (errno, status) in [(EAGAIN, PSC_ERROR), (0, 0)] {
        snp.runs_to(Exit::MapGpaRange {
            gpa: Gpa::new(AT),
            pages: 1,
            to: Privacy::Private,
        });
        if errno == 0 {
            snp.convert(AT, 1, Privacy::Private);
        }
        snp.answer(Answer::Value(errno));
        assert_eq!(snp.says(SAY), status);
    }
    assert_eq!(snp.says(SAY), 0x77);
    assert_eq!(snp.shared(AT), 0, "private memory is not the host's");
    snp.ends();
}

/// A request for a report with certificates: the message is no message, so firmware refuses it.
fn asks_for_a_report(a: &mut CodeAssembler) -> sev_code::Assembled {
    use sev_code::*;
    use_page(a, true)?;
    a.mov(rbx, SHARED_VIEW + OPEN + PAGE)?;
    a.mov(byte_ptr(rbx + 0x34), 5)?;
    for _ in 0..4 {
        let pages = [(RAX, CERTIFICATES), (RBX, 1)];
        page_request(a, 0x8000_0012, [OPEN + PAGE, OPEN + 2 * PAGE], &pages)?;
        a.mov(r12, rdx)?;
        a.shr(rdx, 32)?;
        say_by_page(a, rdx)?;
        say_by_page(a, r12)?;
    }
    Ok(())
}

/// Where the guest wants the certificates.
const CERTIFICATES: u64 = sev_code::OPEN + 3 * PAGE;

#[test]
fn an_snp_guests_request_for_certificates_gets_the_hosts_answer() {
    use sev_code::{GHCB, RBX, SAY};
    let test = "requests::an_snp_guests_request_for_certificates_gets_the_hosts_answer";
    if again(test, AMD.0).is_some() {
        return;
    }
    let mut snp = snp(&host(), asks_for_a_report, true);
    let mut of_firmware = 0;
    for (errno, pages, status) in [
        (Some(libc::ENOSPC), 4, 1),
        (Some(libc::EAGAIN), 0, 2),
        (None, 0, u32::MAX),
        (Some(0), 0, 0),
    ] {
        let gpa = Gpa::new(CERTIFICATES);
        snp.runs_to(Exit::SnpCertificates { gpa, pages: 1 });
        if let Some(errno) = errno {
            let errno = errno as u32;
            snp.answer(Answer::SnpCertificates { errno, pages });
        }
        assert_eq!(snp.says(SAY), status, "{errno:?}");
        of_firmware = snp.says(SAY);
        if pages != 0 {
            let needed = snp.shared(GHCB + RBX as u64);
            assert_eq!(needed, pages, "the guest learns how many it needs");
        }
    }
    assert_ne!(of_firmware, 0, "firmware refuses what is no message");
    snp.ends();
}
