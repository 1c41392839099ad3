//! The built-in guests as guest programs, with the addresses and numbers of the machine code.

use kvm_ops::Gpa;
use kvm_ops::guest::{Action, GuestProgram, Outcome, Script};

use super::{EXIT_PORT, Mixer, RESULT_PORT, SERIAL_PORT};

type Programs = Vec<Box<dyn GuestProgram>>;

/// The data address of guests with one vCPU.
const DATA: u64 = 0x1_0000;

pub(super) fn hello() -> Programs {
    vec![Box::new(say("hello from a guest\n").halt())]
}

pub(super) fn sieve() -> Programs {
    vec![Box::new(Program::new(Sieve {
        stage: SieveStage::Clear(0),
        primes: 0,
    }))]
}

pub(super) fn crc32() -> Programs {
    vec![Box::new(Program::new(Crc::Fill))]
}

pub(super) fn mmio() -> Programs {
    vec![Box::new(Program::new(Mmio {
        round: 0,
        value: 0,
        sum: 0,
        written: false,
    }))]
}

pub(super) fn pair() -> Programs {
    [0, 1]
        .map(|me| -> Box<dyn GuestProgram> {
            Box::new(Program::new(Pair {
                me,
                rounds: 0,
                stage: PairStage::Start,
            }))
        })
        .into()
}

pub(super) fn spin() -> Programs {
    vec![Box::new(Spin(say("until it is stopped\n")))]
}

fn say(text: &str) -> Script {
    Script::new().print(SERIAL_PORT, text)
}

fn report(text: &str, result: u32) -> Script {
    say(text).output(RESULT_PORT, &result.to_le_bytes())
}

/// Prints, then reads memory without end.
struct Spin(Script);

impl GuestProgram for Spin {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if self.0.remaining() > 0 {
            return self.0.step(last);
        }
        Action::Read {
            gpa: Gpa::new(DATA),
            len: 1,
        }
    }
}

/// The next step of a computing guest.
enum Next {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    /// The work is done; the script reports the result.
    End(Script),
}

/// The working part of a guest.
trait Work: Send {
    /// Returns the next step. `data` is the result of the last read, or empty after a write.
    fn next(&mut self, data: &[u8]) -> Next;
}

/// A guest that works, then reports. After a fault it prints a message and shuts down without a
/// report.
struct Program<W> {
    work: W,
    /// The data of the current write: the platform borrows it.
    buffer: Vec<u8>,
    end: Option<Script>,
}

impl<W: Work> Program<W> {
    const fn new(work: W) -> Self {
        Self {
            work,
            buffer: Vec::new(),
            end: None,
        }
    }
}

impl<W: Work> GuestProgram for Program<W> {
    fn step(&mut self, last: Outcome<'_>) -> Action<'_> {
        if self.end.is_none() {
            let next = match last {
                Outcome::Fault(fault) => Next::End(say(&format!("fault: {fault}\n"))),
                Outcome::Data(data) => self.work.next(data),
                _ => self.work.next(&[]),
            };
            match next {
                Next::Read(gpa, len) => {
                    return Action::Read {
                        gpa: Gpa::new(gpa),
                        len,
                    };
                }
                Next::Write(gpa, data) => {
                    self.buffer = data;
                    return Action::Write {
                        gpa: Gpa::new(gpa),
                        data: &self.buffer,
                    };
                }
                Next::End(script) => self.end = Some(script),
            }
        }
        match &mut self.end {
            Some(script) => script.step(last),
            None => Action::Shutdown,
        }
    }
}

/// The sieve of Eratosthenes, its flags in guest memory.
struct Sieve {
    stage: SieveStage,
    primes: u32,
}

enum SieveStage {
    Clear(u64),
    /// The read of this candidate's flag is outstanding.
    Test(u64),
    /// Strikes multiples of the first number; the second is the next multiple.
    Strike(u64, u64),
}

const LIMIT: u64 = 8192;

impl Sieve {
    fn test(&mut self, candidate: u64) -> Next {
        if candidate == LIMIT {
            let text = format!("primes below {LIMIT}: {}\n", self.primes);
            return Next::End(report(&text, self.primes).halt());
        }
        self.stage = SieveStage::Test(candidate);
        Next::Read(DATA + candidate, 1)
    }

    fn strike(&mut self, prime: u64, multiple: u64) -> Next {
        if multiple >= LIMIT {
            return self.test(prime + 1);
        }
        self.stage = SieveStage::Strike(prime, multiple + prime);
        Next::Write(DATA + multiple, vec![1])
    }
}

impl Work for Sieve {
    fn next(&mut self, data: &[u8]) -> Next {
        match self.stage {
            SieveStage::Clear(LIMIT) => self.test(2),
            SieveStage::Clear(at) => {
                self.stage = SieveStage::Clear(at + 4096);
                Next::Write(DATA + at, vec![0; 4096])
            }
            SieveStage::Test(candidate) if data == [0] => {
                self.primes += 1;
                self.strike(candidate, candidate * 2)
            }
            SieveStage::Test(candidate) => self.test(candidate + 1),
            SieveStage::Strike(prime, multiple) => self.strike(prime, multiple),
        }
    }
}

/// Fills memory, then reads it back and computes its CRC-32.
enum Crc {
    Fill,
    Sum { read: u64, crc: u32 },
}

const CRC_BYTES: u64 = 1024;
const CRC_CHUNK: u64 = 64;

impl Work for Crc {
    fn next(&mut self, data: &[u8]) -> Next {
        match self {
            Self::Fill => {
                *self = Self::Sum { read: 0, crc: !0 };
                let mut x: u32 = 1;
                let bytes = (0..CRC_BYTES).map(|_| {
                    x = x.wrapping_mul(1_103_515_245).wrapping_add(12345);
                    (x >> 16) as u8
                });
                Next::Write(DATA, bytes.collect())
            }
            Self::Sum { read, crc } => {
                for byte in data {
                    *crc ^= u32::from(*byte);
                    for _ in 0..8 {
                        let carry = *crc & 1;
                        *crc >>= 1;
                        *crc ^= 0xedb8_8320 * carry;
                    }
                }
                if *read == CRC_BYTES {
                    return Next::End(report("crc of 1024 bytes reported\n", !*crc).halt());
                }
                let at = DATA + *read;
                *read += CRC_CHUNK;
                Next::Read(at, CRC_CHUNK as usize)
            }
        }
    }
}

/// Writes to and reads from the device in turn.
struct Mmio {
    round: u32,
    value: u32,
    sum: u32,
    written: bool,
}

const MMIO_ROUNDS: u32 = 16;

impl Work for Mmio {
    fn next(&mut self, data: &[u8]) -> Next {
        if self.written {
            self.written = false;
            self.round += 1;
            return Next::Read(Mixer::STATE.get(), 4);
        }
        if let Ok(bytes) = data.try_into() {
            self.sum = self.sum.wrapping_add(u32::from_le_bytes(bytes));
        }
        if self.round == MMIO_ROUNDS {
            return Next::End(report("16 rounds with the device\n", self.sum).halt());
        }
        self.written = true;
        self.value = self.value.wrapping_add(0x9e37_79b9);
        Next::Write(Mixer::BASE.get(), self.value.to_le_bytes().into())
    }
}

/// One of two vCPUs that take turns. vCPU 0 starts, and reports at the end.
struct Pair {
    me: u8,
    rounds: u32,
    stage: PairStage,
}

enum PairStage {
    Start,
    /// The read of the turn is outstanding.
    Wait,
    /// The read of the count is outstanding.
    Count,
    /// The count is written; next, passes the turn.
    Give,
    /// The turn is passed.
    Given,
    /// The last count is being read by vCPU 0.
    Report,
}

const TURN: u64 = 0x9000;
const COUNT: u64 = 0x9004;
const PAIR_ROUNDS: u32 = 16;

impl Work for Pair {
    fn next(&mut self, data: &[u8]) -> Next {
        let word = data.try_into().map(u32::from_le_bytes).unwrap_or(0);
        match self.stage {
            PairStage::Wait if word != u32::from(self.me) => Next::Read(TURN, 4),
            PairStage::Wait if self.rounds == PAIR_ROUNDS => {
                self.stage = PairStage::Report;
                Next::Read(COUNT, 4)
            }
            PairStage::Wait => {
                self.stage = PairStage::Count;
                Next::Read(COUNT, 4)
            }
            PairStage::Count => {
                self.stage = PairStage::Give;
                Next::Write(COUNT, (word + 1).to_le_bytes().into())
            }
            PairStage::Give => {
                self.stage = PairStage::Given;
                self.rounds += 1;
                Next::Write(TURN, u32::from(1 - self.me).to_le_bytes().into())
            }
            // vCPU 1 has made its last turn; vCPU 0 waits until the turn is back.
            PairStage::Given if self.me == 1 && self.rounds == PAIR_ROUNDS => {
                Next::End(Script::new())
            }
            PairStage::Start | PairStage::Given => {
                self.stage = PairStage::Wait;
                Next::Read(TURN, 4)
            }
            PairStage::Report => {
                Next::End(report("two vCPUs took 16 turns each\n", word).output(EXIT_PORT, &[0; 4]))
            }
        }
    }
}
