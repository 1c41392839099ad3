//! A log and its replay.

use sha2::{Digest as _, Sha384};

use super::reader::Reader;
use super::{EventKind, LogError, MAX_EVENTS, MAX_LOG, SHA384};

/// The number of RTMRs.
pub const RTMRS: usize = 4;

/// The first bytes of the header event's data.
pub(super) const SIGNATURE: [u8; 16] = *b"Spec ID Event03\0";
/// Bytes of a `TCG_PCR_EVENT` before its data: register, type, a SHA-1 digest.
pub(super) const OLD_DIGEST: usize = 20;

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event<'a> {
    at: usize,
    register: u32,
    kind: EventKind,
    sha384: [u8; 48],
    data: &'a [u8],
}

impl<'a> Event<'a> {
    /// Offset of the event in the log, in bytes.
    pub const fn at(&self) -> usize {
        self.at
    }

    /// The register: 0 is MRTD, 1 to 4 are RTMR0 to RTMR3.
    pub const fn register(&self) -> u32 {
        self.register
    }

    /// The RTMR that the event was measured into. `None` for MRTD, which is not extended while the
    /// TD runs, and for events that are only notes.
    pub fn rtmr(&self) -> Option<usize> {
        let measured = self.kind != EventKind::NO_ACTION;
        measured.then(|| (self.register as usize).checked_sub(1))?
    }

    /// Type of the event.
    pub const fn kind(&self) -> EventKind {
        self.kind
    }

    /// The digest that the RTMR was extended with. `None` for a note.
    pub fn sha384(&self) -> Option<[u8; 48]> {
        (self.kind != EventKind::NO_ACTION).then_some(self.sha384)
    }

    /// Data of the event, of at most [`MAX_LOG`] bytes.
    pub const fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Returns whether the digest is that of the data, for types whose definition says so; `None`
    /// for the others, whose data only describes what was measured.
    pub fn digest_is_of_data(&self) -> Option<bool> {
        let digest = <[u8; 48]>::from(Sha384::digest(self.data));
        self.kind
            .measures_its_data()
            .then_some(digest == self.sha384)
    }
}

/// The events of a log, in the order in which they were measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventLog<'a> {
    events: Vec<Event<'a>>,
}

impl<'a> EventLog<'a> {
    /// Reads a log: the events up to the end of the bytes, or to a filling of zeros or 0xff up to
    /// there, which is how firmware leaves the unused part of the log's memory.
    ///
    /// # Errors
    /// [`LogError`]; nothing is passed over.
    pub fn from_bytes(bytes: &'a [u8]) -> Result<Self, LogError> {
        if bytes.len() > MAX_LOG {
            return Err(LogError::TooLong(bytes.len()));
        }
        let mut reader = Reader::new(bytes);
        let algorithms = header(&mut reader)?;
        let mut events = Vec::new();
        while !at_end(&mut reader)? {
            if events.len() == MAX_EVENTS {
                return Err(LogError::TooMany);
            }
            events.push(event(&mut reader, &algorithms)?);
        }
        Ok(Self { events })
    }

    /// Returns true if the bytes begin as a log does.
    pub fn is_log(bytes: &[u8]) -> bool {
        header(&mut Reader::new(bytes)).is_ok()
    }

    /// The events, without the header.
    pub fn events(&self) -> &[Event<'a>] {
        &self.events
    }

    /// The values of RTMR0 to RTMR3 after these events, each from zeros on.
    pub fn rtmrs(&self) -> [[u8; 48]; RTMRS] {
        let mut rtmrs = [[0; 48]; RTMRS];
        for event in &self.events {
            if let Some(rtmr) = event.rtmr().and_then(|n| rtmrs.get_mut(n)) {
                *rtmr = extend(rtmr, &event.sha384);
            }
        }
        rtmrs
    }
}

/// An RTMR after it is extended (TDG.MR.RTMR.EXTEND): SHA-384 over its value and the digest.
fn extend(rtmr: &[u8; 48], digest: &[u8; 48]) -> [u8; 48] {
    let mut hash = Sha384::new();
    hash.update(rtmr);
    hash.update(digest);
    hash.finalize().into()
}

/// An algorithm and the length of its digests.
type Algorithm = (u16, usize);

/// Reads the header: a `TCG_PCR_EVENT` with a `TCG_EfiSpecIDEvent`.
fn header(reader: &mut Reader<'_>) -> Result<Vec<Algorithm>, LogError> {
    reader.begin();
    let _register = reader.u32()?;
    let kind = EventKind(reader.u32()?);
    let _digest = reader.take(OLD_DIGEST)?;
    let data = reader.data()?;
    if kind != EventKind::NO_ACTION || !data.starts_with(&SIGNATURE) {
        return Err(LogError::Header);
    }
    let algorithms = algorithms(data).map_err(|_| LogError::Header)?;
    match algorithms.contains(&(SHA384, 48)) {
        true => Ok(algorithms),
        false => Err(LogError::NoSha384),
    }
}

fn algorithms(data: &[u8]) -> Result<Vec<Algorithm>, LogError> {
    let mut reader = Reader::new(data);
    // Signature, platform class, minor and major version, errata, size of UINTN.
    reader.take(SIGNATURE.len() + 4 + 4)?;
    let number = reader.u32()?;
    // Each takes four bytes of the data, which bounds the work.
    let all = (0..number).map(|_| Ok((reader.u16()?, usize::from(reader.u16()?))));
    all.collect()
}

/// Returns true at the end of the events; the filling behind them is looked through.
fn at_end(reader: &mut Reader<'_>) -> Result<bool, LogError> {
    let at = reader.begin();
    let rest = reader.rest();
    let Some(filling @ (0 | 0xff)) = rest.first().copied() else {
        return Ok(rest.is_empty());
    };
    // An event may begin with zeros: register and type are in the first eight bytes.
    let head = rest.get(..8).unwrap_or(rest);
    if rest.iter().all(|byte| *byte == filling) {
        return Ok(true);
    }
    match head.iter().all(|byte| *byte == 0xff) {
        true => Err(LogError::Tail(at)),
        false => Ok(false),
    }
}

/// Reads a `TCG_PCR_EVENT2`.
fn event<'a>(reader: &mut Reader<'a>, algorithms: &[Algorithm]) -> Result<Event<'a>, LogError> {
    let at = reader.begin();
    let (register, kind) = (reader.u32()?, EventKind(reader.u32()?));
    if register as usize > RTMRS {
        return Err(LogError::Register { at, register });
    }
    let number = reader.u32()?;
    let mut sha384 = None;
    for _ in 0..number {
        let algorithm = reader.u16()?;
        let known = algorithms.iter().find(|(known, _)| *known == algorithm);
        let (_, length) = known.ok_or(LogError::Algorithm { at, algorithm })?;
        let digest = reader.take(*length)?;
        if let (SHA384, Ok(digest)) = (algorithm, digest.try_into())
            && sha384.replace(digest).is_some()
        {
            return Err(LogError::Digest(at));
        }
    }
    Ok(Event {
        at,
        register,
        kind,
        sha384: sha384.ok_or(LogError::Digest(at))?,
        data: reader.data()?,
    })
}
