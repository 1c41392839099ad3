//! The guest that `kvm-ops run --tech tdx` runs. It checks its launch pages, uses private memory,
//! shares some of it with the host and takes it back, and asks the module for a report.
//!
//! It prints its findings. The first mismatch ends the guest through the debug-exit port.

use std::collections::VecDeque;
use std::ops::Range;

use kvm_ops::guest::{Action, GuestProgram, Outcome, Script};
use kvm_ops::{Gpa, PAGE_SIZE};

use super::TdImage;
use crate::guests::{EXIT_PORT, SERIAL_PORT};

/// TDG.MR.REPORT.
const MR_REPORT: u64 = 4;
/// The offset of MRTD in a report: TDINFO begins at 512, with ATTRIBUTES and XFAM before MRTD.
const REPORT_MRTD: u64 = 512 + 16;

/// The number of pages that the guest shares and takes back.
const CONVERTED: u64 = 16;
/// The number of pages that it uses: the shared ones, one for the report and one for the report
/// data.
const USED: u64 = CONVERTED + 2;

/// The guest's message in shared memory, which the host reads.
pub(crate) const MESSAGE: &[u8; 32] = b"a confidential guest says hello ";

/// One step of the guest.
#[derive(Clone, Debug)]
enum Do {
    Write(u64, Vec<u8>),
    /// Reads, and compares with these bytes.
    Expect(u64, Vec<u8>, &'static str),
    Share(u64, u64),
    Unshare(u64, u64),
    /// Writes a report to the first address, about the data at the second.
    Report(u64, u64),
    Say(String),
    Fail(String),
}

/// The guest.
pub(crate) struct Tour {
    steps: VecDeque<Do>,
    doing: Option<Do>,
    printing: Script,
}

impl Tour {
    /// Creates the guest for a TD of this image with `ram` bytes of memory, and returns it with the
    /// range that it shares with the host. `None` if the image leaves too little memory.
    pub(crate) fn new(image: &TdImage, ram: u64) -> Option<(Self, Range<u64>)> {
        let at = free(image, ram)?;
        let converted = at..at + CONVERTED * PAGE_SIZE;
        let (report, data) = (converted.end, converted.end + PAGE_SIZE);
        let secret = [0x5e; 64];
        let ends = |n: u64| [at, at + (n - 1) * PAGE_SIZE];
        let mut steps = VecDeque::new();
        for page in image.pages() {
            steps.push_back(Do::Expect(
                page.gpa.get(),
                page.contents.to_vec(),
                "a page of the image",
            ));
        }
        let pages = image.pages().len();
        steps.push_back(Do::Say(format!("{pages} pages are as they were launched")));
        for at in ends(CONVERTED) {
            steps.push_back(Do::Write(at, secret.into()));
            steps.push_back(Do::Expect(at, secret.into(), "private memory"));
        }
        steps.push_back(Do::Say("private memory keeps what is written".into()));
        steps.push_back(Do::Share(at, CONVERTED));
        for at in ends(CONVERTED) {
            steps.push_back(Do::Write(at, MESSAGE.into()));
            steps.push_back(Do::Expect(at, MESSAGE.into(), "shared memory"));
        }
        steps.push_back(Do::Say(format!(
            "{CONVERTED} pages at {at:#x} are shared with the host"
        )));
        steps.push_back(Do::Unshare(at, CONVERTED));
        for at in ends(CONVERTED) {
            steps.push_back(Do::Expect(at, vec![0; 64], "memory that was taken back"));
        }
        steps.push_back(Do::Say("taken back, they are private and zero".into()));
        // Write to both pages first: the module writes to accepted pages only.
        steps.push_back(Do::Write(report, vec![0; 1024]));
        steps.push_back(Do::Write(data, vec![7; 64]));
        steps.push_back(Do::Report(report, data));
        let mrtd = image.mrtd().to_vec();
        steps.push_back(Do::Expect(report + REPORT_MRTD, mrtd, "MRTD in the report"));
        steps.push_back(Do::Say(
            "the module's report has the MRTD of the image".into(),
        ));
        let tour = Self {
            steps,
            doing: None,
            printing: Script::new(),
        };
        Some((tour, converted))
    }

    fn fail(&mut self, why: String) {
        self.steps.clear();
        self.steps.push_back(Do::Fail(why));
    }

    /// Checks the outcome of the last step.
    fn check(&mut self, last: Outcome<'_>) {
        let Some(done) = self.doing.take() else {
            return;
        };
        let wrong = match (&done, last) {
            (Do::Write(..) | Do::Share(..) | Do::Unshare(..), Outcome::Done) => return,
            (Do::Expect(_, expected, _), Outcome::Data(data)) if data == expected.as_slice() => {
                return;
            }
            (Do::Report(..), Outcome::Values([0, ..])) => return,
            (Do::Expect(at, _, what), Outcome::Data(_)) => {
                format!("{what} at {at:#x} is not what it must be")
            }
            (Do::Report(..), Outcome::Values([status, ..])) => {
                format!("TDG.MR.REPORT answers {status:#x}")
            }
            (Do::Write(at, _) | Do::Expect(at, ..), Outcome::Fault(fault)) => {
                format!("memory at {at:#x}: {fault}")
            }
            (Do::Share(at, pages) | Do::Unshare(at, pages), Outcome::Fault(fault)) => {
                format!("conversion of {pages} pages at {at:#x}: {fault}")
            }
            (_, other) => format!("an answer that does not fit: {other:?}"),
        };
        self.fail(wrong);
    }
}

impl GuestProgram for Tour {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if self.printing.remaining() == 0 {
            self.check(last);
            match self.steps.pop_front() {
                Some(Do::Say(text)) => {
                    self.printing = Script::new().print(SERIAL_PORT, &format!("{text}\n"));
                }
                Some(Do::Fail(why)) => {
                    self.printing = Script::new()
                        .print(SERIAL_PORT, &format!("failed: {why}\n"))
                        .output(EXIT_PORT, &1_u32.to_le_bytes());
                }
                None => return Action::Halt,
                next => self.doing = next,
            }
        }
        match &self.doing {
            None => self.printing.step(last),
            Some(Do::Write(at, data)) => Action::Write {
                gpa: Gpa::new(*at),
                data,
            },
            Some(Do::Expect(at, expected, _)) => Action::Read {
                gpa: Gpa::new(*at),
                len: expected.len(),
            },
            Some(Do::Share(at, pages)) => Action::Share {
                gpa: Gpa::new(*at),
                pages: *pages,
            },
            Some(Do::Unshare(at, pages)) => Action::Unshare {
                gpa: Gpa::new(*at),
                pages: *pages,
            },
            Some(Do::Report(report, data)) => Action::Tdcall {
                leaf: MR_REPORT,
                args: [*report, *data, 0, 0],
            },
            // These two produce no outcome.
            Some(Do::Say(_) | Do::Fail(_)) => Action::Shutdown,
        }
    }
}

/// Returns the address of [`USED`] pages of RAM that the image does not use, at or above 1 MiB.
fn free(image: &TdImage, ram: u64) -> Option<u64> {
    let bytes = USED * PAGE_SIZE;
    let mut at = 1 << 20;
    let mut pages: Vec<u64> = image.pages().iter().map(|page| page.gpa.get()).collect();
    pages.sort_unstable();
    for page in pages {
        if page < at + bytes && at < page + PAGE_SIZE {
            at = page + PAGE_SIZE;
        }
    }
    (at + bytes <= ram.min(0x8000_0000)).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pages_that_are_used_are_none_of_the_image() {
        let image = TdImage::built_in(kvm_ops_tdvf::Order::SinglePass);
        assert_eq!(free(&image, 64 << 20), Some(1 << 20));
        assert_eq!(free(&image, (1 << 20) + USED * PAGE_SIZE), Some(1 << 20));
        assert_eq!(free(&image, 1 << 20), None);
    }

    #[test]
    fn the_first_thing_that_is_wrong_ends_the_guest() {
        let (mut tour, _) = Tour::new(
            &TdImage::built_in(kvm_ops_tdvf::Order::SinglePass),
            64 << 20,
        )
        .unwrap();
        assert!(matches!(
            tour.step(Outcome::Done),
            Action::Read { len: 4096, .. }
        ));
        let mut said = Vec::new();
        let mut last = tour.step(Outcome::Data(&[0; 4096]));
        loop {
            match last {
                Action::Out {
                    port: SERIAL_PORT,
                    data,
                } => said.extend_from_slice(data),
                Action::Out { port, data } => {
                    assert_eq!((port, data), (EXIT_PORT, &[1, 0, 0, 0][..]));
                    break;
                }
                other => panic!("{other:?}"),
            }
            last = tour.step(Outcome::Done);
        }
        let said = String::from_utf8(said).unwrap();
        assert_eq!(
            said,
            "failed: a page of the image at 0xffffc000 is not what it must be\n"
        );
    }
}
