//! GetQuote from a TD's TDCALL to a verifier that accepts the quote, and the states of its buffer.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_ops::guest::{Action, GuestProgram, Outcome};
use kvm_ops::sim::SimHost;
use kvm_ops::{Gfn, Gpa, Irqchip, Kind, Privacy, SharedMask, Tech, Vendor};
use kvm_ops_attest::Waivers;
use kvm_ops_attest::software::{Collateral, Pcs, QuoteFormat, QuotingService};
use kvm_ops_attest::tdx::{Evidence, Expected, Root, SealedReport, verify};
use kvm_ops_guest::tdx::{QuoteHeader, QuoteStatus, VmcallStatus};
use kvm_ops_machine::{
    ConsoleSink, ExitContext, ExitHandler, Flow, Machine, MachineConfig, NoQuote, QuoteService,
    Quoting, RunLimits, RunReport, TD_REPORT_LEN,
};

const DATA: u64 = 0x8000;
const REPORT: u64 = 0x9000;
const BUFFER: u64 = 0x1_0000;
const PAGES: u64 = 4;
const BYTES: u64 = PAGES * 0x1000;
const VECTOR: u8 = 0x51;
const MR_REPORT: u64 = 4;
const GET_VM_CALL_INFO: u64 = 0x1_0000;
const GET_QUOTE: u64 = 0x1_0002;
const SETUP_EVENT_NOTIFY: u64 = 0x1_0004;
const JANUARY_2026: u64 = 1_767_225_600;

/// What a guest saw.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// R10 and R11 of its calls of the host, in order.
    calls: Vec<(u64, u64)>,
    /// Statuses of the buffer, each once in a row.
    statuses: Vec<QuoteStatus>,
    interrupts: Vec<u8>,
    report: Vec<u8>,
    /// The header and what is behind it, at the end.
    buffer: Vec<u8>,
}

/// How the guest waits for its quote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// It halts until the host interrupts it.
    ForInterrupt,
    /// It reads the status over and over.
    Polling,
}

/// A TD's program: gets a report, puts it into a shared buffer, asks for a quote and waits.
struct Asks {
    mask: SharedMask,
    waits: Waits,
    /// The request's length field, and where the buffer is said to be.
    in_len: u32,
    buffer: (u64, u64),
    step: usize,
    bytes: Vec<u8>,
    seen: Arc<Mutex<Seen>>,
}

impl Asks {
    fn new(waits: Waits, seen: &Arc<Mutex<Seen>>) -> Self {
        Self {
            mask: SharedMask::NONE,
            waits,
            in_len: TD_REPORT_LEN as u32,
            buffer: (BUFFER, BYTES),
            step: 0,
            bytes: Vec::new(),
            seen: Arc::clone(seen),
        }
    }

    fn at(&self, gpa: u64, privacy: Privacy) -> Gpa {
        let frame = self.mask.join(Gfn::containing(Gpa::new(gpa)), privacy);
        Gpa::new(frame.expect("a TD").get() | gpa & 0xfff)
    }

    fn shared(&self, gpa: u64) -> Gpa {
        self.at(gpa, Privacy::Shared)
    }
}

impl GuestProgram for Asks {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        let mut seen = self.seen.lock().expect("no panic");
        match last {
            Outcome::Start { mask, .. } => self.mask = mask,
            Outcome::Values([r10, r11, ..]) => seen.calls.push((r10, r11)),
            Outcome::Interrupt(vector) => seen.interrupts.push(vector),
            Outcome::Fault(fault) => panic!("step {}: {fault}", self.step),
            _ => {}
        }
        match (self.step, last) {
            (6, Outcome::Data(report)) => {
                seen.report = report.to_vec();
                let header = QuoteHeader::request(self.in_len);
                self.bytes = [&header.to_bytes()[..], report].concat();
            }
            (11, Outcome::Data(header)) => {
                let header = header.first_chunk().expect("a header");
                let status = QuoteHeader::from_bytes(*header).status;
                if seen.statuses.last() != Some(&status) {
                    seen.statuses.push(status);
                }
                // Back to where it waits.
                if status == QuoteStatus::IN_FLIGHT {
                    self.step = 9;
                }
            }
            (12.., Outcome::Data(bytes)) => seen.buffer.extend_from_slice(bytes),
            _ => {}
        }
        drop(seen);
        self.step += 1;
        match self.step {
            1 => Action::Unshare {
                gpa: Gpa::new(DATA),
                pages: 2,
            },
            2 => Action::Share {
                gpa: Gpa::new(BUFFER),
                pages: PAGES,
            },
            3 => Action::Tdvmcall {
                leaf: GET_VM_CALL_INFO,
                args: [1, 0, 0, 0],
            },
            4 => Action::Write {
                gpa: self.at(DATA, Privacy::Private),
                data: &[0xda; 64],
            },
            5 => Action::Tdcall {
                leaf: MR_REPORT,
                args: [REPORT, DATA, 0, 0],
            },
            6 => Action::Read {
                gpa: self.at(REPORT, Privacy::Private),
                len: TD_REPORT_LEN,
            },
            7 => Action::Write {
                gpa: self.shared(BUFFER),
                data: &self.bytes,
            },
            8 => Action::Tdvmcall {
                leaf: SETUP_EVENT_NOTIFY,
                args: [VECTOR.into(), 0, 0, 0],
            },
            9 => {
                let (at, bytes) = self.buffer;
                let args = [self.shared(at).get(), bytes, 0, 0];
                Action::Tdvmcall {
                    leaf: GET_QUOTE,
                    args,
                }
            }
            10 if self.waits == Waits::ForInterrupt => Action::Halt,
            10 => Action::Read {
                gpa: self.shared(BUFFER),
                len: 1,
            },
            11 => Action::Read {
                gpa: self.shared(BUFFER),
                len: QuoteHeader::LEN,
            },
            step @ 12..16 => {
                let page = BUFFER + (step as u64 - 12) * 0x1000;
                Action::Read {
                    gpa: self.shared(page),
                    len: 0x1000,
                }
            }
            _ => Action::Shutdown,
        }
    }
}

/// Runs a guest over a quoting service that knows the host's platform.
fn run<S: QuoteService>(host: &SimHost, program: Asks, service: S) -> (RunReport, Seen) {
    let seen = Arc::clone(&program.seen);
    let config = MachineConfig::new()
        .kind(Kind::Of(Tech::Tdx))
        .memory(16 << 20)
        .irqchip(Irqchip::Split)
        .program(program);
    let mut machine = Machine::build(host, config).expect("a machine");
    let devices = machine.devices(ConsoleSink::discard());
    let quoting = Quoting::new(service);
    let handler = |exit: &mut ExitContext<'_>| match quoting.answer(exit) {
        true => Flow::Continue,
        false => devices.handle(exit),
    };
    let limits = RunLimits::none().deadline(Duration::from_secs(60));
    let ran = machine.run_while(&handler, limits, |parts| quoting.serve(parts));
    let (report, ()) = ran.expect("a run");
    assert!(machine.destroy().is_clean());
    let seen = seen.lock().expect("no panic").clone();
    (report, seen)
}

/// The software platform's quoting service, for reports of this host.
fn software(host: &SimHost) -> impl QuoteService {
    let platform = Arc::clone(host.tdx_platform().expect("TDX"));
    let service = QuotingService::new([7; 32]).expect("a service");
    move |report: &[u8; TD_REPORT_LEN]| {
        let mac = |report: &[u8; TD_REPORT_LEN]| platform.verify_report(report);
        let quote = service.quote(report, &mac, QuoteFormat::V4);
        quote.map_err(|_| NoQuote::Refused)
    }
}

const SUCCESS: u64 = VmcallStatus::SUCCESS.0;

#[test]
fn a_guests_quote_comes_with_an_interrupt_and_a_verifier_accepts_it() {
    let host = SimHost::new(Vendor::Intel);
    for waits in [Waits::ForInterrupt, Waits::Polling] {
        let program = Asks::new(waits, &Arc::default());
        let (report, seen) = run(&host, program, software(&host));
        assert!(!report.is_failure(), "{report:?}");
        // GetTdVmCallInfo tells of both; the TDCALL, and the two calls of the host succeed.
        assert_eq!(seen.calls[0], (SUCCESS, 0b11), "{waits:?}");
        let statuses: Vec<u64> = seen.calls.iter().map(|(r10, _)| *r10).collect();
        assert_eq!(statuses, [SUCCESS; 4], "{waits:?}");
        assert_eq!(seen.statuses.last(), Some(&QuoteStatus::SUCCESS));
        if waits == Waits::ForInterrupt {
            assert_eq!(seen.interrupts, [VECTOR]);
        }
        let header = QuoteHeader::from_bytes(*seen.buffer.first_chunk().expect("a header"));
        let quote = &seen.buffer[QuoteHeader::LEN..][..header.out_len as usize];
        accepts(&seen.report, quote);
    }
}

/// Verifies a quote against what the TD's own report says.
fn accepts(report: &[u8], quote: &[u8]) {
    let says = SealedReport::from_bytes(report).expect("a report").report;
    let service = QuotingService::new([7; 32]).expect("a service");
    let platform = service.platform();
    let collateral = Pcs.collateral(platform, &Collateral::new(platform, says.tee_tcb_svn));
    let collateral = collateral.expect("collateral").to_string();
    let evidence = Evidence {
        quote,
        collateral: collateral.as_bytes(),
        event_log: None,
    };
    let expected = Expected {
        mrtd: Some(says.mrtd),
        rtmr: says.rtmr.map(Some),
        mr_config_id: Some(says.mr_config_id),
        mr_owner: Some(says.mr_owner),
        mr_owner_config: Some(says.mr_owner_config),
        mr_seam: Some(says.mr_seam),
        attributes: Some(says.attributes),
        xfam: Some(says.xfam),
        report_data: Some([0xda; 64]),
        ..Expected::default()
    };
    let root = Root::software().expect("a root");
    let verified = verify(&evidence, &root, &expected, &Waivers::none(), JANUARY_2026);
    assert!(verified.verdict.is_accepted(), "{:#?}", verified.verdict);
}

#[test]
fn what_the_service_refuses_or_lacks_is_a_status_of_the_buffer() {
    let host = SimHost::new(Vendor::Intel);
    let room = BYTES as usize - QuoteHeader::LEN;
    let ask = |answer: Result<Vec<u8>, NoQuote>| {
        let service = move |_: &[u8; TD_REPORT_LEN]| answer.clone();
        let program = Asks::new(Waits::Polling, &Arc::default());
        let (report, seen) = run(&host, program, service);
        assert!(!report.is_failure(), "{report:?}");
        *seen.statuses.last().expect("a status")
    };
    let long = |len: usize| Ok(vec![1; len]);
    assert_eq!(ask(Err(NoQuote::Refused)), QuoteStatus::ERROR);
    assert_eq!(ask(Err(NoQuote::Unavailable)), QuoteStatus::UNAVAILABLE);
    assert_eq!(ask(long(room)), QuoteStatus::SUCCESS);
    // A quote that does not fit, and one that is none.
    assert_eq!(ask(long(room + 1)), QuoteStatus::ERROR);
    assert_eq!(ask(long(0)), QuoteStatus::ERROR);
}

#[test]
fn a_guest_that_changed_its_report_gets_no_quote() {
    let host = SimHost::new(Vendor::Intel);
    let other = SimHost::new(Vendor::Intel);
    // The service of another platform: the MAC is not its own.
    let program = Asks::new(Waits::ForInterrupt, &Arc::default());
    let (_, seen) = run(&host, program, software(&other));
    assert_eq!(seen.statuses, [QuoteStatus::ERROR]);
    assert_eq!(seen.interrupts, [VECTOR]);
    // A request that is not as long as a report.
    let mut program = Asks::new(Waits::ForInterrupt, &Arc::default());
    program.in_len = 64;
    let (_, seen) = run(&host, program, software(&host));
    assert_eq!(seen.statuses, [QuoteStatus::ERROR]);
}

#[test]
fn a_buffer_that_is_none_is_refused_and_the_service_not_asked() {
    let host = SimHost::new(Vendor::Intel);
    let asked = AtomicUsize::new(0);
    let invalid = VmcallStatus::INVALID_OPERAND.0;
    for (buffer, status) in [
        ((BUFFER, 0), invalid),
        ((BUFFER, 0x21_0000), invalid),
        // The pages behind are private, or no memory.
        ((BUFFER, BYTES + 0x1000), invalid),
        ((0x100_0000, 0x1000), invalid),
        ((BUFFER + 8, 0x1000), VmcallStatus::ALIGN_ERROR.0),
        ((BUFFER, 0x1800), VmcallStatus::ALIGN_ERROR.0),
        // No header of the known version there.
        ((BUFFER + 0x2000, 0x1000), invalid),
    ] {
        let mut program = Asks::new(Waits::Polling, &Arc::default());
        program.buffer = buffer;
        let service = |_: &[u8; TD_REPORT_LEN]| {
            asked.fetch_add(1, Ordering::SeqCst);
            Err(NoQuote::Refused)
        };
        let (report, seen) = run(&host, program, service);
        assert!(!report.is_failure(), "{report:?}");
        let (r10, _) = *seen.calls.last().expect("a call");
        assert_eq!(r10, status, "{buffer:x?}");
        assert_eq!(
            seen.statuses,
            [QuoteStatus::SUCCESS],
            "the guest's own header"
        );
    }
    assert_eq!(asked.load(Ordering::SeqCst), 0);
}
