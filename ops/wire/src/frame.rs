//! Frames: how records travel over a byte stream.
//!
//! ```text
//! 0   magic    u32  the protocol's
//! 4   version  u8   the protocol's
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

use core::marker::PhantomData;

use embedded_io::{Read, ReadExactError, Write};

use crate::error::{FrameError, Result, WireError};
use crate::seal::{Direction, Seal, TAG};

/// The part of the header that the tag covers.
const HEAD: usize = 20;
/// Bytes of a frame before its payload.
pub const HEADER: usize = HEAD + TAG;

/// The least length of a last part that is written from where it lies.
const LARGE: usize = 1 << 14;

/// The kinds of records of a protocol, with the limits of each.
pub trait Kinds: Copy {
    /// The number that each frame begins with.
    const MAGIC: u32;
    /// The version of the format.
    const VERSION: u8;

    /// The kind of that number.
    fn from_wire(raw: u8) -> Option<Self>;

    /// Its number.
    fn number(self) -> u8;

    /// The least and the greatest length of its payload.
    fn limits(self) -> (usize, usize);
}

/// Declares the kinds of a protocol as an enum `Kind`: magic number and version, then for each kind
/// its number and the least and greatest length of its payload.
///
/// ```
/// kvm_ops_wire::kinds! {
///     b"TEST", 1;
///     /// Says hello, with a number of 4 bytes.
///     Hello = 1, 4, 4;
/// }
/// # fn main() {
/// use kvm_ops_wire::Kinds;
/// assert_eq!(Kind::from_wire(1), Some(Kind::Hello));
/// assert_eq!(Kind::Hello.limits(), (4, 4));
/// # }
/// ```
#[macro_export]
macro_rules! kinds {
    ($magic:literal, $version:literal;
     $($(#[$doc:meta])* $name:ident = $number:literal, $min:expr, $max:expr;)*) => {
        /// The kind of a record.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum Kind { $($(#[$doc])* $name = $number,)* }

        impl $crate::Kinds for Kind {
            const MAGIC: u32 = u32::from_le_bytes(*$magic);
            const VERSION: u8 = $version;

            fn from_wire(raw: u8) -> Option<Self> {
                match raw { $($number => Some(Self::$name),)* _ => None }
            }

            fn number(self) -> u8 {
                self as u8
            }

            fn limits(self) -> (usize, usize) {
                match self { $(Self::$name => ($min, $max),)* }
            }
        }
    };
}

/// One end of a link, with the buffer for one frame.
#[derive(Debug)]
pub struct Wire<'l, L, K> {
    link: &'l mut L,
    /// Of the frames that this end sends.
    direction: Direction,
    /// Makes and checks the tags.
    pub seal: Seal,
    buffer: Vec<u8>,
    /// Bytes written and read, headers included.
    pub bytes: u64,
    kinds: PhantomData<K>,
}

impl<'l, L: Read + Write, K: Kinds> Wire<'l, L, K> {
    /// An end of `link` whose frames go in `direction`.
    pub fn new(link: &'l mut L, direction: Direction, seal: Seal) -> Self {
        Self {
            link,
            direction,
            seal,
            buffer: Vec::new(),
            bytes: 0,
            kinds: PhantomData,
        }
    }

    /// Writes a frame; the payload is the concatenation of `parts`. A large last part is not copied.
    ///
    /// # Errors
    /// A payload that its kind cannot have; the link's.
    pub fn send(&mut self, kind: K, index: u64, parts: &[&[u8]]) -> Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let (min, max) = kind.limits();
        if length < min || length > max {
            return Err(FrameError::Length {
                kind: kind.number(),
                claimed: u32::try_from(length).unwrap_or(u32::MAX),
            }
            .into());
        }
        let out = &mut self.buffer;
        out.clear();
        out.extend_from_slice(&K::MAGIC.to_le_bytes());
        out.extend_from_slice(&[K::VERSION, kind.number(), 0, 0]);
        out.extend_from_slice(&index.to_le_bytes());
        out.extend_from_slice(&(length as u32).to_le_bytes());
        out.extend_from_slice(&[0; TAG]);
        let (copied, large) = match parts.split_last() {
            Some((last, others)) if last.len() >= LARGE => (others, *last),
            _ => (parts, &[][..]),
        };
        for part in copied {
            out.extend_from_slice(part);
        }
        let parts = [&out[HEADER..], large];
        let tag = self.seal.tag(self.direction, &out[..HEAD], parts);
        out[HEAD..HEADER].copy_from_slice(&tag);
        self.link.write_all(out).map_err(link_error)?;
        self.link.write_all(large).map_err(link_error)?;
        self.bytes += (HEADER + length) as u64;
        Ok(())
    }

    /// Flushes the link.
    ///
    /// # Errors
    /// The link's.
    pub fn flush(&mut self) -> Result<()> {
        self.link.flush().map_err(link_error)
    }

    /// Reads a frame: kind, index, payload.
    ///
    /// # Errors
    /// Bytes that are no frame; the link's.
    pub fn receive(&mut self) -> Result<(K, u64, &[u8])> {
        let mut header = [0; HEADER];
        self.link.read_exact(&mut header).map_err(read_error)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&header[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        if word(0) != K::MAGIC {
            return Err(FrameError::Magic(word(0)).into());
        }
        if header[4] != K::VERSION {
            return Err(FrameError::Version(header[4]).into());
        }
        let kind = K::from_wire(header[5]).ok_or(FrameError::Kind(header[5]))?;
        let reserved = u16::from_le_bytes([header[6], header[7]]);
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved).into());
        }
        let index = u64::from(word(8)) | u64::from(word(12)) << 32;
        let (claimed, (min, max)) = (word(16), kind.limits());
        let length = claimed as usize;
        if length < min || length > max {
            let kind = kind.number();
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

fn link_error<E: embedded_io::Error>(error: E) -> WireError {
    WireError::Link(error.kind())
}

fn read_error<E: embedded_io::Error>(error: ReadExactError<E>) -> WireError {
    match error {
        ReadExactError::UnexpectedEof => WireError::Truncated,
        ReadExactError::Other(error) => link_error(error),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec;

    kinds! {
        b"TEST", 7;
        /// Of one length.
        Fixed = 1, 16, 16;
        /// Of many.
        Any = 2, 0, 40_000;
        /// Empty.
        Empty = 9, 0, 0;
    }

    const ALL: [Kind; 3] = [Kind::Fixed, Kind::Any, Kind::Empty];

    /// Bytes that were written, to be read again.
    #[derive(Default)]
    struct Tape {
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
    fn wire(tape: &mut Tape) -> Wire<'_, Tape, Kind> {
        Wire::new(tape, Direction::ToTarget, Seal::new(None))
    }

    fn any_frame() -> impl Strategy<Value = (Kind, u64, Vec<u8>)> {
        let kind = (0..ALL.len()).prop_map(|i| ALL[i]);
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
            prop_assert_eq!(wire.receive().map(|_| ()), Err(WireError::Truncated));
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
            prop_assert_eq!(got, Err(WireError::Truncated));
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
        for kind in &ALL {
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
