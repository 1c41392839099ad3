//! A link with a man in the middle, who loses, delays, repeats, changes or cuts one frame.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Bytes of a frame before its payload, and the places of its kind, of the payload's length and of the tag.
const HEADER: usize = 36;
const KIND: usize = 5;
const LENGTH: usize = 16;
const TAG: usize = 20;

/// The fate of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Lost,
    Late,
    Twice,
    /// This byte of the payload or, in a frame without one, of the index is changed; the checksum is made
    /// good where a link has no key.
    Changed(usize),
    /// The link ends in the middle of it.
    Cut,
}

/// What the man in the middle does to frame `nth` of those that this end writes.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub nth: usize,
    pub fate: Fate,
}

/// One end of a link.
pub struct Link {
    socket: UnixStream,
    plan: Option<Plan>,
    written: Vec<u8>,
    /// The kinds of the frames that this end wrote.
    kinds: Vec<u8>,
    held: Option<Vec<u8>>,
    cut: bool,
}

impl Link {
    pub fn pair(plans: [Option<Plan>; 2]) -> [Self; 2] {
        let (a, b) = UnixStream::pair().unwrap();
        // A peer that waits for a lost frame gives up; any other waits as long as a busy machine needs.
        let withholds = |plan: &Plan| matches!(plan.fate, Fate::Lost | Fate::Late);
        let is_patient = !plans.iter().flatten().any(withholds);
        let mut sockets = [a, b].into_iter();
        plans.map(|plan| {
            let socket = sockets.next().unwrap();
            let patience = Duration::from_millis(if is_patient { 30_000 } else { 1_000 });
            socket.set_read_timeout(Some(patience)).unwrap();
            socket.set_write_timeout(Some(patience)).unwrap();
            Self {
                socket,
                plan,
                written: Vec::new(),
                kinds: Vec::new(),
                held: None,
                cut: false,
            }
        })
    }

    /// The kinds of the frames that this end wrote.
    pub fn kinds(&self) -> &[u8] {
        &self.kinds
    }

    fn deliver(&mut self, frame: &[u8]) -> io::Result<()> {
        self.socket.write_all(frame)
    }

    fn pass(&mut self, mut frame: Vec<u8>) -> io::Result<()> {
        let now = self.plan.filter(|plan| plan.nth == self.kinds.len());
        self.kinds.push(frame[KIND]);
        match now.map(|plan| plan.fate) {
            None => self.deliver(&frame)?,
            Some(Fate::Lost) => {}
            Some(Fate::Late) => {
                self.held = Some(frame);
                return Ok(());
            }
            Some(Fate::Twice) => {
                self.deliver(&frame)?;
                self.deliver(&frame)?;
            }
            Some(Fate::Changed(at)) => {
                let place = match frame.len() - HEADER {
                    0 => 8,
                    payload => HEADER + at % payload,
                };
                frame[place] ^= 0x40;
                let mut sum = crc32fast::Hasher::new();
                sum.update(&frame[..TAG]);
                sum.update(&frame[HEADER..]);
                let has_key = frame[TAG + 4..HEADER].iter().any(|byte| *byte != 0);
                if !has_key {
                    frame[TAG..TAG + 4].copy_from_slice(&sum.finalize().to_le_bytes());
                }
                self.deliver(&frame)?;
            }
            Some(Fate::Cut) => {
                self.deliver(&frame[..frame.len() / 2])?;
                self.cut = true;
                let _ = self.socket.shutdown(std::net::Shutdown::Both);
            }
        }
        if let Some(late) = self.held.take() {
            self.deliver(&late)?;
        }
        Ok(())
    }
}

impl Read for Link {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.read(buffer)
    }
}

impl Write for Link {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.cut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.written.extend_from_slice(data);
        while self.written.len() >= HEADER {
            let length = self.written[LENGTH..LENGTH + 4].try_into().unwrap();
            let whole = HEADER + u32::from_le_bytes(length) as usize;
            if self.written.len() < whole {
                break;
            }
            let rest = self.written.split_off(whole);
            let frame = std::mem::replace(&mut self.written, rest);
            self.pass(frame)?;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
