//! Reads the text of a record.

use std::time::Duration;

use super::format::{
    Answer, Call, Device, HEAD, LOST, Machine, NewFile, Record, RecordError, Step, Vendor, What,
};
use super::places::Place;

fn machine(line: &str) -> Option<Machine> {
    let mut words = line.split(' ');
    words.next().filter(|word| *word == "machine")?;
    let vendor = match words.next()? {
        "intel" => Vendor::Intel,
        "amd" => Vendor::Amd,
        _ => return None,
    };
    let registers = words.map(|word| u32::from_str_radix(word, 16).ok());
    let registers: Vec<u32> = registers.collect::<Option<_>>()?;
    Some(Machine {
        vendor,
        encryption: registers.try_into().ok()?,
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs
        .iter()
        .map(|[a, b]| Some(digit(*a)? << 4 | digit(*b)?));
    bytes
        .collect::<Option<Vec<u8>>>()
        .filter(|_| rest.is_empty())
}

/// Seconds, and nine digits of a second.
fn time(text: &str) -> Option<Duration> {
    let (seconds, rest) = text.split_once('.')?;
    let nanos = rest.parse().ok().filter(|_| rest.len() == 9)?;
    Some(Duration::new(seconds.parse().ok()?, nanos))
}

fn step(line: &str) -> Option<Step> {
    let mut words = line.split(' ');
    let name = words.next()?;
    let hex = |word: Option<&str>| u64::from_str_radix(word?, 16).ok();
    let size = |word: Option<&str>| usize::try_from(hex(word)?).ok();
    let number = |word: Option<&str>| word?.parse().ok();
    let place = |word: Option<&str>| Place::parse(word?);
    let bytes = |word: Option<&str>| unhex(word?);
    let step = match name {
        "lock" => Step::Lock(words.next()?.to_owned(), words.next()?.parse().ok()?),
        "clock" => Step::Clock(number(words.next())? as i32, time(words.next()?)?),
        "page-in" => Step::PageIn(size(words.next())?, bytes(words.next())?),
        "page-out" => Step::PageOut(size(words.next())?, bytes(words.next())?),
        "read" => Step::Read(place(words.next())?, bytes(words.next())?),
        "read-fault" => Step::ReadFault(place(words.next())?, words.next()?.parse().ok()?),
        "write" => Step::Write(place(words.next())?, bytes(words.next())?),
        "write-fault" => Step::WriteFault(place(words.next())?),
        "new" => Step::New(
            number(words.next())?,
            match words.next()? {
                "vm" => NewFile::Vm,
                "vcpu" => NewFile::Vcpu,
                "stats" => NewFile::Stats,
                "guest_memfd" => NewFile::GuestMemfd {
                    size: hex(words.next())?,
                    flags: hex(words.next())?,
                },
                _ => return None,
            },
        ),
        "event" => Step::Event(number(words.next())?, words.next()?.parse().ok()?),
        "memory" => Step::Memory(
            number(words.next())?,
            hex(words.next())?,
            bytes(words.next())?,
        ),
        "signal" => Step::Signal(number(words.next())?),
        _ => return None,
    };
    words.next().is_none().then_some(step)
}

fn what(words: &mut std::str::Split<'_, char>) -> Option<What> {
    let mut next = || words.next();
    let what = match next()? {
        "open" => {
            let device = match next()? {
                "/dev/kvm" => Device::Kvm,
                "/dev/sev" => Device::Sev,
                _ => return None,
            };
            What::Open(device, next()?.parse().ok()?)
        }
        "ioctl" => {
            let file = next()?.parse().ok()?;
            let number = u32::from_str_radix(next()?, 16).ok()?;
            // The name is for readers.
            next()?;
            let argument = u64::from_str_radix(next()?, 16).ok()?;
            What::Ioctl {
                file,
                number,
                argument,
            }
        }
        _ => return None,
    };
    next().is_none().then_some(what)
}

fn answer(text: &str) -> Option<Answer> {
    let mut words = text.split(' ');
    Some(match words.next()? {
        "file" => Answer::File(words.next()?.parse().ok()?),
        "error" => Answer::Errno(words.next()?.parse().ok()?),
        value => Answer::Value(value.parse().ok()?),
    })
}

impl Record {
    /// Reads a text.
    pub(super) fn parse(text: &str) -> Result<Self, RecordError> {
        let mut lines = text.lines().enumerate().map(|(n, line)| (n + 1, line));
        let wrong = |line, why| RecordError { line, why };
        match lines.next() {
            Some((_, HEAD)) => {}
            _ => return Err(wrong(1, "this is no record, or one of another version")),
        }
        let machine = lines.next().and_then(|(_, line)| machine(line));
        let machine = machine.ok_or(wrong(2, "no machine is named"))?;
        let mut calls = Vec::new();
        while let Some((n, line)) = lines.next() {
            if line.starts_with(LOST) {
                return Err(wrong(
                    n,
                    "the recorder met memory that no argument leads to",
                ));
            }
            let mut words = line.split(' ');
            let thread = match words.next() {
                Some("thread") => words.next().and_then(|number| number.parse().ok()),
                _ => None,
            };
            let parts = thread.and_then(|thread| Some((thread, what(&mut words)?)));
            let (thread, what) = parts.ok_or(wrong(n, "a call is expected"))?;
            let (mut steps, mut last) = (Vec::new(), n);
            let answer = loop {
                let cut = wrong(last + 1, "the record ends inside of a call");
                let (n, line) = lines.next().ok_or(cut)?;
                last = n;
                if let Some(text) = line.strip_prefix("= ") {
                    break answer(text).ok_or(wrong(n, "an answer is expected"))?;
                }
                let text = line.strip_prefix(' ');
                let read = text.and_then(step);
                steps.push(read.ok_or(wrong(n, "a step or an answer is expected"))?);
            };
            calls.push(Call {
                thread,
                what,
                steps,
                answer,
            });
        }
        Ok(Self { machine, calls })
    }
}
