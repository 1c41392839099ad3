//! Properties of ranges: every page once, the largest sizes, nothing outside; whatever the host
//! mapped, and whatever it answers.

use kvm_ops_guest::sev::{self, Reply, RmpCode, Validate, Validated};
use kvm_ops_guest::tdx::{self, Accept, CompletionStatus, Gpaw, Limits, MapGpa, Progress, Regs};
use kvm_ops_guest::{GpaRange, PageSize, Privacy, RangeError};
use proptest::prelude::*;
use std::collections::BTreeMap;

const PAGE: u64 = 0x1000;
const MIB2: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// The memory that hosts of these tests map: a GiB and two large pages on each side.
const START: u64 = GIB - 2 * MIB2;
const END: u64 = 2 * GIB + 2 * MIB2;

/// A host's mapping of `START..END`.
#[derive(Clone, Debug)]
struct Mapping {
    /// Pages by address.
    pages: BTreeMap<u64, PageSize>,
    /// The pages that the guest took, by address.
    taken: BTreeMap<u64, PageSize>,
    calls: usize,
    mismatches: usize,
}

enum Take {
    Done,
    TooLarge,
}

impl Mapping {
    /// One page of 1 GiB if `gig`, large pages elsewhere, but for the `small` ones.
    fn new(gig: bool, small: &[u64]) -> Self {
        let mut pages = BTreeMap::new();
        for at in (START..END).step_by(MIB2 as usize) {
            if gig && (GIB..2 * GIB).contains(&at) {
                continue;
            }
            pages.insert(at, PageSize::Size2M);
        }
        if gig {
            pages.insert(GIB, PageSize::Size1G);
        }
        let mut mapping = Self {
            pages,
            taken: BTreeMap::new(),
            calls: 0,
            mismatches: 0,
        };
        for n in small {
            mapping.split(START + n * MIB2, PageSize::Size4K);
        }
        mapping
    }

    fn around(&self, gpa: u64) -> (u64, PageSize) {
        let (at, size) = self.pages.range(..=gpa).next_back().expect("mapped");
        (*at, *size)
    }

    /// Splits what lies around an address until it is `size`.
    fn split(&mut self, gpa: u64, size: PageSize) {
        loop {
            let (at, old) = self.around(gpa);
            let Some(smaller) = old.smaller().filter(|s| *s >= size) else {
                return;
            };
            for piece in (at..at + old.bytes()).step_by(smaller.bytes() as usize) {
                self.pages.insert(piece, smaller);
            }
        }
    }

    /// The guest takes a page; a smaller one than the host mapped makes the host split.
    fn take(&mut self, gpa: u64, size: PageSize) -> Take {
        self.calls += 1;
        assert_eq!(gpa % size.bytes(), 0, "aligned");
        if self.around(gpa).1 < size {
            self.mismatches += 1;
            return Take::TooLarge;
        }
        self.split(gpa, size);
        assert_eq!(self.taken.insert(gpa, size), None, "{gpa:#x} twice");
        Take::Done
    }

    /// Checks what was taken of a range, given what the host had mapped at first.
    fn check(&self, range: GpaRange, before: &Mapping, offered: PageSize) {
        let mut at = range.start();
        for (gpa, size) in &self.taken {
            assert_eq!(*gpa, at, "a gap or an overlap");
            at += size.bytes();
            let mut larger = *size;
            while larger < offered {
                larger = PageSize::DESCENDING[2 - larger as usize - 1];
                let head = gpa & !(larger.bytes() - 1);
                let fits = head >= range.start() && head + larger.bytes() <= range.end();
                let mapped = before.around(*gpa).1 >= larger;
                assert!(!fits || !mapped, "{gpa:#x} could have been {larger}");
            }
        }
        assert_eq!(at, range.end(), "all of it, and no more");
        assert_eq!(self.calls, self.taken.len() + self.mismatches);
    }
}

fn mappings() -> impl Strategy<Value = Mapping> {
    let blocks = (END - START) / MIB2;
    let small = prop::collection::vec(prop_oneof![0..6u64, 0..blocks, blocks - 4..blocks], 0..4);
    (any::<bool>(), small).prop_map(|(gig, small)| {
        let small: Vec<u64> = small
            .into_iter()
            .filter(|n| !gig || !(2..514).contains(n))
            .collect();
        Mapping::new(gig, &small)
    })
}

/// Ranges that begin and end anywhere, also exactly at large pages.
fn ranges() -> impl Strategy<Value = GpaRange> {
    let edge = |at: u64| prop_oneof![Just(at), Just(at + MIB2), at..at + 2 * MIB2];
    let low = edge(START);
    let high = prop_oneof![edge(GIB + MIB2), edge(2 * GIB - MIB2), edge(2 * GIB)];
    let end = prop_oneof![high, START + 2 * MIB2 + PAGE..START + 6 * MIB2];
    (low, end).prop_map(|(start, end)| {
        let start = start & !(PAGE - 1);
        let end = (end & !(PAGE - 1)).max(start + PAGE).min(END);
        GpaRange::new(start, end - start).expect("a range")
    })
}

fn accept(mapping: &mut Mapping, range: GpaRange, offered: PageSize) {
    let mut accept = Accept::new(range, Gpaw::Bits48).expect("fits");
    let mut last = None;
    loop {
        let regs = match accept.next(last.as_ref()) {
            Progress::Call(regs) => regs,
            Progress::Done => return,
            other => panic!("{other:?}"),
        };
        assert_eq!(regs.rax, 6);
        let size = PageSize::DESCENDING[2 - (regs.rcx & 7) as usize];
        let rax = if size > offered {
            CompletionStatus::OPERAND_INVALID | 1
        } else {
            match mapping.take(regs.rcx & !7, size) {
                Take::Done => 0,
                Take::TooLarge => CompletionStatus::PAGE_SIZE_MISMATCH | size as u64,
            }
        };
        last = Some(Regs {
            rax,
            ..Regs::default()
        });
    }
}

fn validate(mapping: &mut Mapping, range: GpaRange) {
    let mut validate = Validate::new(range, true).expect("fits");
    let mut last = None;
    loop {
        let operation = match validate.next(last) {
            sev::Progress::Pvalidate(operation) => operation,
            sev::Progress::Done => return,
            other => panic!("{other:?}"),
        };
        let code = match mapping.take(operation.gpa, operation.size) {
            Take::Done => RmpCode::SUCCESS,
            Take::TooLarge => RmpCode::FAIL_SIZEMISMATCH,
        };
        last = Some(Reply::Pvalidate(Validated {
            code,
            unchanged: false,
        }));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn accept_takes_every_page_once_in_the_largest_size(
        mapping in mappings(),
        range in ranges(),
        gigs in any::<bool>(),
    ) {
        let offered = if gigs { PageSize::Size1G } else { PageSize::Size2M };
        let mut now = mapping.clone();
        accept(&mut now, range, offered);
        now.check(range, &mapping, offered);
    }

    #[test]
    fn pvalidate_takes_every_page_once_in_the_largest_size(
        mapping in mappings(),
        range in ranges(),
    ) {
        let mut now = mapping.clone();
        validate(&mut now, range);
        now.check(range, &mapping, PageSize::Size2M);
    }

    #[test]
    fn mapgpa_stays_in_its_range_and_ends_whatever_the_host_answers(
        pages in 1u64..64,
        start in 0u64..1 << 34,
        shared in any::<bool>(),
        answers in prop::collection::vec((0u64..3, 0u64..70, any::<u64>()), 200),
    ) {
        let (to, bit) = if shared { (Privacy::Shared, 1 << 47) } else { (Privacy::Private, 0) };
        let range = GpaRange::pages(start * PAGE, pages).expect("a range");
        let limits = Limits { stalled_retries: 3, ..Limits::DEFAULT };
        let mut map = MapGpa::new(range, to, Gpaw::Bits48).expect("fits").limits(limits);
        let mut last = None;
        let mut from = range.start();
        let mut calls = 0;
        for (kind, page, noise) in answers {
            let regs = match map.next(last.as_ref()) {
                Progress::Call(regs) => regs,
                Progress::Done | Progress::Failed(_) => break,
                Progress::Flush(_) => unreachable!("never asked for"),
            };
            calls += 1;
            // Every call is what remains, with the one bit that says what is wanted.
            prop_assert_eq!(regs.r12 & 1 << 47, bit);
            let gpa = regs.r12 & !(1 << 47);
            prop_assert!(gpa >= from && gpa < range.end());
            prop_assert_eq!(gpa + regs.r13, range.end());
            from = gpa;
            let (r10, r11) = match kind {
                0 => (1, regs.r12 + (page % 2) * PAGE),
                1 => (1, regs.r12 + page * PAGE),
                _ => (noise % 2, noise),
            };
            last = Some(Regs { r10, r11, ..Regs::default() });
        }
        prop_assert!(calls <= 3 * pages, "{} calls for {} pages", calls, pages);
        prop_assert!(!matches!(map.next(last.as_ref()), Progress::Call(_)));
    }

    #[test]
    fn a_td_conversion_ends_whatever_comes_back_and_stays_ended(
        pages in 1u64..40,
        private in any::<bool>(),
        noise in prop::collection::vec(any::<[u64; 3]>(), 200),
        kinds in prop::collection::vec(0usize..7, 200),
    ) {
        let to = if private { Privacy::Private } else { Privacy::Shared };
        let range = GpaRange::pages(0x1ff000, pages).expect("a range");
        let limits = Limits { stalled_retries: 2, busy: 2 };
        let mut convert = tdx::Convert::new(range, to, Gpaw::Bits52).expect("fits").limits(limits);
        let mut last = None;
        let mut end = None;
        for ([rax, r10, r11], kind) in noise.into_iter().zip(kinds) {
            match convert.next(last.as_ref()) {
                Progress::Flush(_) => last = None,
                Progress::Call(call) => {
                    let known = [
                        0,
                        0,
                        0,
                        CompletionStatus::PAGE_SIZE_MISMATCH,
                        CompletionStatus::OPERAND_BUSY,
                        CompletionStatus::PAGE_ALREADY_ACCEPTED,
                        rax,
                    ];
                    let host = [0, 0, 1, 1, 1, r10 % 3, r10];
                    let next = [0, 0, call.r12, call.r12 + PAGE, call.r12 + PAGE, r11, r11];
                    last = Some(Regs {
                        rax: known[kind],
                        r10: host[kind],
                        r11: next[kind],
                        ..Regs::default()
                    });
                }
                step => {
                    if let Progress::Failed(error) = step {
                        prop_assert!(error.rest.start() >= range.start());
                        prop_assert_eq!(error.rest.end(), range.end());
                        prop_assert!(!error.rest.is_empty());
                    }
                    prop_assert_eq!(*end.get_or_insert(step), step);
                }
            }
        }
        prop_assert!(end.is_some(), "200 answers are enough for 40 pages");
    }

    #[test]
    fn an_snp_conversion_ends_whatever_comes_back_and_stays_ended(
        pages in 1u64..40,
        private in any::<bool>(),
        noise in prop::collection::vec((any::<u64>(), any::<u32>(), 0usize..12), 200),
    ) {
        let to = if private { Privacy::Private } else { Privacy::Shared };
        let range = GpaRange::pages(0x1ff000, pages).expect("a range");
        let mut convert = sev::Convert::new(range, to, sev::Kind::Snp).expect("fits");
        let mut last = None;
        let mut end = None;
        for (response, code, kind) in noise {
            last = match (convert.next(last), kind) {
                (sev::Progress::Flush(_), _) => None,
                (sev::Progress::Pvalidate(_), 0..11) => Some(Reply::Pvalidate(Validated {
                    code: RmpCode([0, 0, 0, 0, 0, 0, 0, 0, 6, 6, code][kind]),
                    unchanged: kind == 10,
                })),
                (sev::Progress::GhcbMsr(_), 0..10) => Some(Reply::GhcbMsr(0x015)),
                (sev::Progress::GhcbMsr(_), 10) => Some(Reply::GhcbMsr(response)),
                (sev::Progress::Pvalidate(_) | sev::Progress::GhcbMsr(_), _) => {
                    Some(Reply::Hypercall(response))
                }
                (step, _) => {
                    if let sev::Progress::Failed(error) = step {
                        prop_assert!(error.rest.start() >= range.start());
                        prop_assert_eq!(error.rest.end(), range.end());
                        prop_assert!(!error.rest.is_empty());
                    }
                    prop_assert_eq!(*end.get_or_insert(step), step);
                    None
                }
            };
        }
        prop_assert!(end.is_some(), "200 answers are enough for 40 pages");
    }

    #[test]
    fn ranges_are_whole_pages_that_do_not_wrap(start: u64, bytes: u64) {
        for (start, bytes) in [(start, bytes), (start & !0xFFF, bytes & !0xFFF)] {
            match GpaRange::new(start, bytes) {
                Ok(range) => {
                    prop_assert_eq!(range.bytes(), bytes);
                    prop_assert!(range.start() < range.end());
                    prop_assert_eq!((start | bytes) & 0xFFF, 0);
                }
                Err(RangeError::Unaligned) => prop_assert_ne!((start | bytes) & 0xFFF, 0),
                Err(RangeError::Empty) => prop_assert_eq!(bytes, 0),
                Err(error) => {
                    prop_assert_eq!(error, RangeError::TooHigh);
                    prop_assert_eq!(start.checked_add(bytes), None);
                }
            }
        }
    }
}
