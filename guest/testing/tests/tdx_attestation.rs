//! From TDG.MR.REPORT over GetQuote to a verifier that trusts the software root.

use kvm_ops_attest::Waivers;
use kvm_ops_attest::software::{Collateral, Pcs, QuoteFormat, QuotingService};
use kvm_ops_attest::tdx::{Evidence, Expected, Root, verify};
use kvm_ops_guest::tdx::{QuoteError, QuoteHeader, REPORT_LEN, TdGuest, TdInfo, TdReport};
use kvm_ops_guest::{GpaRange, SharedBuffer};
use kvm_ops_guest_test::tdx::module::report::{TEE_TCB_SVN, mr_seam};
use kvm_ops_guest_test::tdx::{Exit, QuoteStatus, Reply, TestTd, TestTdBuilder, Vcpu};
use proptest::prelude::*;

const SHARED: u64 = 1 << 47;
const BUFFER: u64 = 0x10000;
const ROOM: u64 = 0x8000;
const DATA: u64 = 0x8000;
const REPORT: u64 = 0x9000;
const JANUARY_2026: u64 = 1_767_225_600;

/// The buffer through another value of the vCPU, as a kernel has a mapping.
struct Mapping(Vcpu);

impl SharedBuffer for Mapping {
    fn read(&mut self, offset: usize, bytes: &mut [u8]) {
        let at = SHARED | (BUFFER + offset as u64);
        self.0.read_into(at, bytes).expect("shared");
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        let at = SHARED | (BUFFER + offset as u64);
        self.0.write(at, bytes).expect("shared");
    }
}

fn td() -> TestTdBuilder {
    TestTd::builder()
        .measured(0x1000, b"kernel")
        .accepted(DATA..REPORT + 0x1000)
        .shared(BUFFER..BUFFER + ROOM)
        .measurement_ids([[1; 48], [2; 48], [3; 48]])
}

fn buffer() -> GpaRange {
    GpaRange::new(BUFFER, ROOM).expect("a range")
}

/// A report over `data`, with RTMR 2 extended.
fn report(cpu: &mut Vcpu, data: &[u8; 64]) -> [u8; REPORT_LEN] {
    cpu.write(DATA, &[9; 48]).expect("ours");
    let mut td = TdGuest::new(&mut *cpu).expect("TDG.VP.INFO");
    td.rtmr_extend(DATA, 2).expect("extended");
    cpu.write(DATA, data).expect("ours");
    let mut td = TdGuest::new(&mut *cpu).expect("TDG.VP.INFO");
    td.report(REPORT, DATA).expect("a report");
    let mut report = [0; REPORT_LEN];
    cpu.read_into(REPORT, &mut report).expect("ours");
    report
}

/// The whole way of a guest, which polls `polls` times.
fn quote(td: &TestTd, polls: usize) -> Result<Vec<u8>, QuoteError> {
    let mut memory = Mapping(td.vcpu(0).expect("one"));
    td.run(|cpu| {
        let report = report(cpu, &[7; 64]);
        let mut quote = [0; 0x4000];
        let mut left = polls;
        let wait = || {
            left = left.saturating_sub(1);
            left > 0
        };
        let mut td = TdGuest::new(cpu).expect("TDG.VP.INFO");
        let len = td.get_quote(buffer(), &mut memory, &report, &mut quote, wait)?;
        Ok(quote[..len].to_vec())
    })
    .expect("runs to its end")
}

#[test]
fn a_verifier_accepts_the_quote_that_the_guest_got() {
    let service = QuotingService::new([5; 32]).expect("a service");
    let says = Collateral::new(service.platform(), TEE_TCB_SVN);
    let collateral = Pcs.collateral(service.platform(), &says);
    let collateral = format!("{:#}", collateral.expect("collateral"));
    for format in [QuoteFormat::V4, QuoteFormat::V5] {
        let service = QuotingService::new([5; 32]).expect("a service");
        let td = td()
            .quote_delay(20)
            .quoting(move |report, platform| {
                let mac = |report: &[u8; REPORT_LEN]| platform.verify_report(report);
                let quote = service.quote(report, &mac, format);
                quote.map_err(|_| QuoteStatus::ERROR)
            })
            .build()
            .expect("a td");
        let quote = quote(&td, 1000).expect("a quote");

        let evidence = Evidence {
            quote: &quote,
            collateral: collateral.as_bytes(),
            event_log: None,
        };
        let expected = Expected {
            mrtd: Some(td.mrtd()),
            rtmr: td.rtmrs().map(Some),
            mr_config_id: Some([1; 48]),
            mr_owner: Some([2; 48]),
            mr_owner_config: Some([3; 48]),
            mr_seam: Some(mr_seam()),
            attributes: Some(TdInfo::SEPT_VE_DISABLE),
            xfam: Some(3),
            report_data: Some([7; 64]),
            ..Expected::default()
        };
        assert_ne!(td.rtmrs()[2], [0; 48]);
        let root = Root::software().expect("a root");
        let verdict = |expected: &Expected| {
            let none = Waivers::none();
            verify(&evidence, &root, expected, &none, JANUARY_2026).verdict
        };
        let first = verdict(&expected);
        assert!(first.is_accepted(), "{:?}", first.rows());
        // The same quote of a TD that had extended nothing would not do.
        let mut other = expected;
        other.rtmr[2] = Some([0; 48]);
        let refused = verdict(&other);
        let failure = refused.first_failure().map(|(check, _)| check.name);
        assert_eq!((refused.is_accepted(), failure), (false, Some("rtmr2")));
    }
}

#[test]
fn a_report_says_what_the_td_is() {
    let td = td().build().expect("a td");
    let report = td.run(|cpu| report(cpu, &[7; 64])).expect("ends");
    let said = TdReport::new(&report);
    assert_eq!(said.report_data(), [7; 64]);
    assert_eq!(said.attributes(), TdInfo::SEPT_VE_DISABLE);
    assert_eq!(said.xfam(), 3);
    assert_eq!((said.mrtd(), said.rtmrs()), (td.mrtd(), td.rtmrs()));
    assert_eq!(said.measurement_ids(), [[1; 48], [2; 48], [3; 48]]);
}

#[test]
fn a_guest_gives_up_and_learns_of_errors() {
    let slow = td().quote_delay(1000).quoting(|_, _| Ok(vec![1])).build();
    assert_eq!(quote(&slow.expect("a td"), 5), Err(QuoteError::GivenUp));
    let none = td().build().expect("a td");
    let status = QuoteStatus::UNAVAILABLE;
    assert_eq!(quote(&none, 5), Err(QuoteError::Status(status)));
    let long = td()
        .quoting(|_, _| Ok(vec![1; 0x4001]))
        .build()
        .expect("a td");
    assert_eq!(quote(&long, 5), Err(QuoteError::Room { len: 0x4001 }));
    let refuses = td().host(|_, _| Reply::Status(kvm_ops_guest::tdx::VmcallStatus::RETRY, 0));
    let refused = quote(&refuses.build().expect("a td"), 5);
    assert!(matches!(refused, Err(QuoteError::Call(_))), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn no_header_of_a_hostile_host_is_believed(
        version in prop_oneof![Just(1), any::<u64>()],
        status in prop_oneof![Just(0), any::<u64>()],
        in_len: u32,
        out_len in prop_oneof![any::<u32>(), 0u32..0x9000],
    ) {
        let header = QuoteHeader { version, status: QuoteStatus(status), in_len, out_len };
        let td = td()
            .host(move |host, exit| {
                if let Exit::Vmcall(_) = exit {
                    host.write(BUFFER, &header.to_bytes()).expect("ram");
                }
                Reply::Enter
            })
            .build()
            .expect("a td");
        match quote(&td, 3) {
            Ok(quote) => {
                prop_assert_eq!((version, status), (1, 0));
                prop_assert_eq!(quote.len(), out_len as usize);
            }
            Err(QuoteError::Room { len }) => {
                prop_assert!(len > 0x4000 && len as u64 <= ROOM - 24);
            }
            Err(QuoteError::Header(said)) => {
                prop_assert_eq!(said, header);
                prop_assert!(version != 1 || out_len == 0 || u64::from(out_len) > ROOM - 24);
            }
            Err(QuoteError::Status(said)) => prop_assert_eq!(said.0, status),
            Err(error) => prop_assert_eq!((error, status), (QuoteError::GivenUp, u64::MAX)),
        }
    }
}
