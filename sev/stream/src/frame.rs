//! Frames: how records travel over a byte stream.
//!
//! ```text
//! 0   magic    u32  "KOMS"
//! 4   version  u8   2
//! 5   kind     u8
//! 6   reserved u16  0
//! 8   index    u64  the record's number, or the number that is due next
//! 16  length   u32  of the payload
//! 20  tag      16   of bytes 0 to 19 and the payload; see `seal`
//! 36  payload
//! ```
//! All numbers are little-endian. A length is checked against the limits of its kind before a byte
//! of the payload is read, so what a peer claims never makes anyone allocate.

use alloc::vec::Vec;

use embedded_io::{Read, ReadExactError, Write};

use crate::error::{FrameError, MigrateError, Result};
use crate::packet::{PACKET_HEADER, PAGE};
use crate::seal::{Direction, Seal, TAG};

/// The part of the header that the tag covers.
const HEAD: usize = 20;
pub(crate) const HEADER: usize = HEAD + TAG;
const MAGIC: u32 = u32::from_le_bytes(*b"KOMS");
const VERSION: u8 = 2;

/// The most bytes that a certificate chain or a session may have.
pub const MAX_BLOB: usize = 16 << 10;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $min:expr, $max:expr;)*) => {
        /// The kind of a record.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            #[cfg(test)]
            pub(crate) const ALL: &'static [Kind] = &[$(Kind::$name),*];

            fn from_wire(raw: u8) -> Option<Self> {
                match raw { $($number => Some(Self::$name),)* _ => None }
            }

            /// The least and the greatest length of its payload.
            pub(crate) const fn limits(self) -> (usize, usize) {
                match self { $(Self::$name => ($min, $max),)* }
            }
        }
    };
}

kinds! {
    /// Source: session and shape of the guest.
    Hello = 1, 16 + 8 + 1 + 4 + 4 + 2, 16 + 8 + 1 + 4 + 4 + 2 + 16 * crate::layout::MAX_RANGES;
    /// Source: goes on with a session.
    Resume = 2, 16 + 8, 16 + 8;
    /// Target: its challenge and certificates.
    Offer = 3, 24 + 12, 24 + 12 + 3 * MAX_BLOB;
    /// Source: the operands of RECEIVE_START.
    Start = 4, 12, 12 + 2 * MAX_BLOB;
    /// Target: its state and challenge.
    Ready = 5, 1 + 24, 1 + 24;
    /// Source: a page of private memory.
    Private = 6, 8 + PACKET_HEADER + PAGE, 8 + PACKET_HEADER + PAGE;
    /// Source: a page of shared memory; without data, zeros.
    Shared = 7, 8, 8 + PAGE;
    /// Source: a frame that holds nothing any more.
    Absent = 8, 8, 8;
    /// Source: the register state of a vCPU, encrypted for SEV-ES.
    Vcpu = 9, 5, 5 + PACKET_HEADER + PAGE;
    /// Source: a round is over.
    RoundEnd = 10, 4, 4;
    /// Target: it has all records of the round.
    RoundOk = 11, 0, 0;
    /// Source: no record comes any more.
    Prepare = 12, 0, 0;
    /// Target: the guest could run here.
    Prepared = 13, 0, 0;
    /// Source: the guest is the target's now.
    Commit = 14, 0, 0;
    /// Target: it runs the guest.
    Done = 15, 0, 0;
    /// Source: the migration is cancelled.
    Cancel = 16, 0, 0;
    /// Target: refuses and says why.
    Refuse = 17, 10, 10;
}

/// One end of a link, with the buffer for one frame.
pub(crate) struct Wire<'l, L> {
    link: &'l mut L,
    /// Of the frames that this end sends.
    direction: Direction,
    pub(crate) seal: Seal,
    buffer: Vec<u8>,
    /// Bytes written and read, headers included.
    pub(crate) bytes: u64,
}

impl<'l, L: Read + Write> Wire<'l, L> {
    pub(crate) fn new(link: &'l mut L, direction: Direction, seal: Seal) -> Self {
        Self {
            link,
            direction,
            seal,
            buffer: Vec::with_capacity(HEADER + 8 + PACKET_HEADER + PAGE),
            bytes: 0,
        }
    }

    /// Writes a frame; the payload is the concatenation of `parts`.
    pub(crate) fn send(&mut self, kind: Kind, index: u64, parts: &[&[u8]]) -> Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let (min, max) = kind.limits();
        if length < min || length > max {
            return Err(FrameError::Length {
                kind: kind as u8,
                claimed: u32::try_from(length).unwrap_or(u32::MAX),
            }
            .into());
        }
        let out = &mut self.buffer;
        out.clear();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[VERSION, kind as u8, 0, 0]);
        out.extend_from_slice(&index.to_le_bytes());
        out.extend_from_slice(&(length as u32).to_le_bytes());
        out.extend_from_slice(&[0; TAG]);
        for part in parts {
            out.extend_from_slice(part);
        }
        let tag = self.seal.tag(self.direction, &out[..HEAD], &out[HEADER..]);
        out[HEAD..HEADER].copy_from_slice(&tag);
        self.link.write_all(out).map_err(link_error)?;
        self.bytes += out.len() as u64;
        Ok(())
    }

    /// Flushes the link.
    pub(crate) fn flush(&mut self) -> Result<()> {
        self.link.flush().map_err(link_error)
    }

    /// Reads a frame: kind, index, payload.
    pub(crate) fn receive(&mut self) -> Result<(Kind, u64, &[u8])> {
        let mut header = [0; HEADER];
        self.link.read_exact(&mut header).map_err(read_error)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        if word(0) != MAGIC {
            return Err(FrameError::Magic(word(0)).into());
        }
        if header[4] != VERSION {
            return Err(FrameError::Version(header[4]).into());
        }
        let kind = Kind::from_wire(header[5]).ok_or(FrameError::Kind(header[5]))?;
        let reserved = u16::from_le_bytes([header[6], header[7]]);
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved).into());
        }
        let index = u64::from(word(8)) | u64::from(word(12)) << 32;
        let (claimed, (min, max)) = (word(16), kind.limits());
        let length = claimed as usize;
        if length < min || length > max {
            let kind = kind as u8;
            return Err(FrameError::Length { kind, claimed }.into());
        }
        self.buffer.resize(length, 0);
        self.link.read_exact(&mut self.buffer).map_err(read_error)?;
        let mut tag = [0; TAG];
        tag.copy_from_slice(&header[HEAD..]);
        let from = self.direction.reversed();
        if !self.seal.verify(from, &header[..HEAD], &self.buffer, &tag) {
            return Err(FrameError::Tag.into());
        }
        self.bytes += (HEADER + length) as u64;
        Ok((kind, index, &self.buffer))
    }
}

fn link_error<E: embedded_io::Error>(error: E) -> MigrateError {
    MigrateError::Link(error.kind())
}

fn read_error<E: embedded_io::Error>(error: ReadExactError<E>) -> MigrateError {
    match error {
        ReadExactError::UnexpectedEof => MigrateError::Truncated,
        ReadExactError::Other(error) => link_error(error),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    /// Bytes that were written, to be read again.
    #[derive(Default)]
    pub(crate) struct Tape {
        bytes: Vec<u8>,
        at: usize,
    }

    impl embedded_io::ErrorType for Tape {
        type Error = core::convert::Infallible;
    }

    impl Read for Tape {
        fn read(&mut self, out: &mut [u8]) -> core::result::Result<usize, Self::Error> {
            let n = out.len().min(self.bytes.len() - self.at);
            out[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
            self.at += n;
            Ok(n)
        }
    }

    impl Write for Tape {
        fn write(&mut self, data: &[u8]) -> core::result::Result<usize, Self::Error> {
            self.bytes.extend_from_slice(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> core::result::Result<(), Self::Error> {
            Ok(())
        }
    }

    /// Both ends of a tape: it reads the direction that it writes.
    fn wire(tape: &mut Tape) -> Wire<'_, Tape> {
        Wire::new(tape, Direction::ToTarget, Seal::new(None))
    }

    fn any_frame() -> impl Strategy<Value = (Kind, u64, Vec<u8>)> {
        let kind = (0..Kind::ALL.len()).prop_map(|i| Kind::ALL[i]);
        (kind, any::<u64>(), any::<u16>(), any::<u8>()).prop_map(|(kind, index, more, fill)| {
            let (min, max) = kind.limits();
            (
                kind,
                index,
                vec![fill; min + usize::from(more) % (max - min + 1)],
            )
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_sent_is_received(frames in proptest::collection::vec(any_frame(), 0..8)) {
            let mut tape = Tape::default();
            let mut wire = wire(&mut tape);
            for (kind, index, payload) in &frames {
                let (a, b) = payload.split_at(payload.len() / 2);
                wire.send(*kind, *index, &[a, b]).unwrap();
            }
            for (kind, index, payload) in &frames {
                let got = wire.receive().unwrap();
                prop_assert_eq!((got.0, got.1, got.2), (*kind, *index, &payload[..]));
            }
            prop_assert_eq!(wire.receive().map(|_| ()), Err(MigrateError::Truncated));
        }

        #[test]
        fn a_flipped_bit_anywhere_is_noticed(frame in any_frame(), at in any::<u32>(), bit in 0..8u32) {
            let mut tape = Tape::default();
            let (kind, index, payload) = &frame;
            wire(&mut tape).send(*kind, *index, &[payload]).unwrap();
            let at = at as usize % tape.bytes.len();
            tape.bytes[at] ^= 1 << bit;
            prop_assert!(wire(&mut tape).receive().is_err());
        }

        #[test]
        fn a_cut_anywhere_is_noticed(frame in any_frame(), at in any::<u32>()) {
            let mut tape = Tape::default();
            let (kind, index, payload) = &frame;
            wire(&mut tape).send(*kind, *index, &[payload]).unwrap();
            tape.bytes.truncate(at as usize % tape.bytes.len());
            let got = wire(&mut tape).receive().map(|_| ());
            prop_assert_eq!(got, Err(MigrateError::Truncated));
        }

        #[test]
        fn any_bytes_at_all_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut tape = Tape { bytes, at: 0 };
            let mut wire = wire(&mut tape);
            prop_assert!(wire.receive().is_err());
        }
    }

    #[test]
    fn a_claimed_length_beyond_the_limit_is_refused_before_anything_is_read() {
        for kind in Kind::ALL {
            let (min, max) = kind.limits();
            for claimed in [max as u32 + 1, u32::MAX, (min as u32).wrapping_sub(1)] {
                if (min..=max).contains(&(claimed as usize)) {
                    continue;
                }
                let mut tape = Tape::default();
                let payload = vec![0; min];
                wire(&mut tape).send(*kind, 0, &[&payload]).unwrap();
                tape.bytes[16..20].copy_from_slice(&claimed.to_le_bytes());
                let mut wire = wire(&mut tape);
                let expected = FrameError::Length {
                    kind: *kind as u8,
                    claimed,
                };
                assert_eq!(wire.receive().map(|_| ()), Err(expected.into()));
                assert!(wire.buffer.capacity() < 1 << 16);
            }
        }
    }
}
