//! What two hosts compare of a TD that went from one to the other.

use std::fmt;
use std::io::{self, Read, Write};
use std::time::Duration;

use kvm_ops::sim::SimHost;
use kvm_ops::tdx::TdxVm;
use serde::{Deserialize, Serialize};
use soft_tdx_module::{HostLeaf, Regs};

use crate::failure::{Failure, Outcome};

/// The most bytes of a summary as it travels.
const MAX: u32 = 0x1000;

/// Fields of a TD (TDX module ABI, "TDCS").
const ATTRIBUTES: u64 = 0x1110_0003_0000_0000;
const XFAM: u64 = 0x1110_0003_0000_0001;

/// The identity of a TD.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Summary {
    mrtd: String,
    rtmrs: Vec<String>,
    attributes: u64,
    xfam: u64,
    /// The nanoseconds from the word that the TD runs here to its first instruction, of a post-copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resumed_after: Option<u64>,
}

/// The parts of two summaries that are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Equal {
    pub(super) mrtd: bool,
    pub(super) rtmrs: bool,
    pub(super) attributes: bool,
    pub(super) xfam: bool,
}

impl Equal {
    /// Returns whether all parts are.
    pub(super) const fn all(self) -> bool {
        self.mrtd && self.rtmrs && self.attributes && self.xfam
    }
}

impl fmt::Display for Equal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = [
            ("MRTD", self.mrtd),
            ("RTMRs", self.rtmrs),
            ("ATTRIBUTES", self.attributes),
            ("XFAM", self.xfam),
        ];
        let words = parts.map(|(name, equal)| match equal {
            true => name.to_owned(),
            false => format!("not {name}"),
        });
        f.write_str(&words.join(", "))
    }
}

impl Summary {
    /// Reads the identity of a TD: RTMRs from the software platform, which shows them, and all else as a host
    /// does (TDH.MNG.RD).
    pub(super) fn of_td(host: &SimHost, vm: &TdxVm<SimHost>) -> Outcome<Self> {
        let failed = || Failure::new("the host does not tell the TD's identity");
        let platform = host.tdx_platform().ok_or_else(failed)?;
        let tdr = vm.tdr().ok_or_else(failed)?.get();
        let view = platform.td(tdr).ok_or_else(failed)?;
        let field = |id| {
            let operands = Regs {
                rcx: tdr,
                rdx: id,
                ..Regs::default()
            };
            platform
                .call(0, HostLeaf::MngRd, operands)
                .map(|out| out.r8)
                .map_err(|error| {
                    Failure::because("the host does not tell the TD's identity", error)
                })
        };
        Ok(Self {
            mrtd: hex::encode(view.mrtd),
            rtmrs: view.rtmr.iter().map(hex::encode).collect(),
            attributes: field(ATTRIBUTES)?,
            xfam: field(XFAM)?,
            resumed_after: None,
        })
    }

    /// With the time from the word that the TD runs here to its first instruction.
    pub(super) fn resumed_after(self, time: Duration) -> Self {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        Self {
            resumed_after: Some(nanoseconds),
            ..self
        }
    }

    /// That time, if it is told.
    pub(super) fn resumes_after(&self) -> Option<Duration> {
        self.resumed_after.map(Duration::from_nanos)
    }

    /// Sends this one and takes the peer's.
    pub(super) fn exchange_first(&self, link: &mut (impl Read + Write)) -> io::Result<Self> {
        self.send(link)?;
        Self::receive(link)
    }

    /// Takes the peer's and sends this one.
    pub(super) fn exchange_second(&self, link: &mut (impl Read + Write)) -> io::Result<Self> {
        let theirs = Self::receive(link)?;
        self.send(link)?;
        Ok(theirs)
    }

    fn send(&self, link: &mut impl Write) -> io::Result<()> {
        let bytes = serde_json::to_vec(self)?;
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        link.write_all(&length.to_le_bytes())?;
        link.write_all(&bytes)?;
        link.flush()
    }

    fn receive(link: &mut impl Read) -> io::Result<Self> {
        let mut length = [0; 4];
        link.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length > MAX {
            let text = format!("a summary of {length:#x} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let mut bytes = vec![0; length as usize];
        link.read_exact(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// Compares two summaries.
    pub(super) fn equal(&self, other: &Self) -> Equal {
        Equal {
            mrtd: self.mrtd == other.mrtd,
            rtmrs: self.rtmrs == other.rtmrs,
            attributes: self.attributes == other.attributes,
            xfam: self.xfam == other.xfam,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary() -> Summary {
        Summary {
            mrtd: "00".into(),
            rtmrs: vec!["11".into(); 4],
            attributes: 1 << 29,
            xfam: 3,
            resumed_after: None,
        }
    }

    #[test]
    fn a_summary_arrives_as_it_was_sent_and_each_difference_shows() {
        let mut bytes = Vec::new();
        summary().send(&mut bytes).unwrap();
        let came = Summary::receive(&mut &bytes[..]).unwrap();
        assert!(came.equal(&summary()).all());
        let differs = |change: fn(&mut Summary)| {
            let mut other = summary();
            change(&mut other);
            let equal = summary().equal(&other);
            assert!(!equal.all());
            [equal.mrtd, equal.rtmrs, equal.attributes, equal.xfam]
        };
        let found = [
            differs(|other| other.mrtd.push('0')),
            differs(|other| other.rtmrs[3].push('0')),
            differs(|other| other.attributes = 0),
            differs(|other| other.xfam = 7),
        ];
        for (n, equal) in found.iter().enumerate() {
            assert!(
                equal
                    .iter()
                    .enumerate()
                    .all(|(at, equal)| *equal == (at != n))
            );
        }
    }

    #[test]
    fn a_summary_that_claims_too_much_is_refused_before_it_is_read() {
        let claim = (MAX + 1).to_le_bytes();
        let error = Summary::receive(&mut &claim[..]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
