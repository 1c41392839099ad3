//! GetQuote with its buffer, between a guest and the host's quoting service.

use kvm_ops_guest::GpaRange;
use kvm_ops_guest::tdx::{CallError, QuoteHeader, TdGuest, Vmcall, VmcallStatus};
use kvm_ops_guest_test::tdx::module::Platform;
use kvm_ops_guest_test::tdx::{QuoteStatus, TestTd, TestTdBuilder, Vcpu};

const SHARED: u64 = 1 << 47;
const BUFFER: u64 = 0x10000;
const ROOM: u64 = 0x4000;

fn td() -> TestTdBuilder {
    TestTd::builder()
        .accepted(0x8000..0xa000)
        .shared(BUFFER..BUFFER + ROOM)
}

/// A service whose quote is the report's data, backwards.
fn backwards(report: &[u8; 1024], _: &Platform) -> Result<Vec<u8>, QuoteStatus> {
    Ok(report[128..192].iter().rev().copied().collect())
}

fn header(cpu: &mut Vcpu) -> QuoteHeader {
    let mut bytes = [0; QuoteHeader::LEN];
    cpu.read_into(SHARED | BUFFER, &mut bytes).expect("shared");
    QuoteHeader::from_bytes(bytes)
}

/// Puts a report into the buffer and calls the host.
fn ask(cpu: &mut Vcpu, header: QuoteHeader) -> Result<[u64; 4], CallError> {
    let data: Vec<u8> = (0..64).collect();
    cpu.write(0x8000, &data).expect("ours");
    let mut td = TdGuest::new(&mut *cpu).expect("TDG.VP.INFO");
    td.report(0x9000, 0x8000).expect("a report");
    let report = cpu.read(0x9000, 1024).expect("ours");
    cpu.write(SHARED | BUFFER, &header.to_bytes())
        .expect("shared");
    let data = SHARED | (BUFFER + QuoteHeader::LEN as u64);
    cpu.write(data, &report).expect("shared");
    let buffer = GpaRange::new(BUFFER, ROOM).expect("a range");
    let mut td = TdGuest::new(cpu).expect("TDG.VP.INFO");
    td.vmcall(Vmcall::GetQuote(buffer))
}

#[test]
fn a_quote_comes_into_the_buffer_after_a_while() {
    let td = td()
        .quoting(backwards)
        .quote_delay(3)
        .build()
        .expect("a td");
    td.run(|cpu| {
        ask(cpu, QuoteHeader::request(1024)).expect("taken");
        let mut polls = 0;
        while header(cpu).status == QuoteStatus::IN_FLIGHT {
            polls += 1;
        }
        assert_eq!(polls, 3);
        let done = header(cpu);
        assert_eq!((done.status, done.out_len), (QuoteStatus::SUCCESS, 64));
        let quote = cpu.read(SHARED | (BUFFER + 24), 64).expect("shared");
        assert_eq!(quote, (0..64).rev().collect::<Vec<u8>>());
    })
    .expect("runs to its end");
}

#[test]
fn a_host_without_a_service_says_so_in_the_buffer() {
    let status = |td: TestTdBuilder, request| {
        let td = td.build().expect("a td");
        td.run(|cpu| {
            ask(cpu, request).expect("taken");
            let header = header(cpu);
            (header.status, header.out_len)
        })
        .expect("runs to its end")
    };
    let whole = QuoteHeader::request(1024);
    assert_eq!(status(td(), whole), (QuoteStatus::UNAVAILABLE, 0));
    let fails = td().quoting(|_, _| Err(QuoteStatus::ERROR));
    assert_eq!(status(fails, whole), (QuoteStatus::ERROR, 0));
    let large = td().quoting(|_, _| Ok(vec![0; ROOM as usize]));
    assert_eq!(status(large, whole), (QuoteStatus::ERROR, 0), "no room");
    let short = td().quoting(backwards);
    let request = QuoteHeader::request(1023);
    assert_eq!(status(short, request), (QuoteStatus::ERROR, 0), "no report");
}

#[test]
fn a_buffer_that_is_private_or_no_request_is_refused() {
    let refused = Ok(Err(CallError::Host(VmcallStatus::INVALID_OPERAND)));
    let td = td().quoting(backwards).build().expect("a td");
    let version = QuoteHeader {
        version: 2,
        ..QuoteHeader::request(1024)
    };
    assert_eq!(td.run(|cpu| ask(cpu, version)), refused);
    let answer = td.run(|cpu| {
        let private = GpaRange::new(0x8000, 0x1000).expect("a range");
        let mut td = TdGuest::new(cpu).expect("TDG.VP.INFO");
        td.vmcall(Vmcall::GetQuote(private))
    });
    assert_eq!(answer, refused);
}

#[test]
fn a_report_is_of_this_platform_and_of_no_other() {
    let td = td().build().expect("a td");
    let report = td.run(|cpu| {
        let mut td = TdGuest::new(&mut *cpu).expect("TDG.VP.INFO");
        td.report(0x9000, 0x8000).expect("a report");
        cpu.read(0x9000, 1024).expect("ours")
    });
    let report: [u8; 1024] = report.expect("ends").try_into().expect("a report");
    assert!(td.verify_report(&report));
    let other = TestTd::builder().seed(2).build().expect("a td");
    assert!(!other.verify_report(&report));
}
