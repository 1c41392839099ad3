//! The peers that a migration TD hands keys to.

use thiserror::Error;

use crate::identity::Identity;

/// The measurements that a peer must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurements {
    /// MRTD.
    pub mrtd: [u8; 48],
    /// The RTMRs.
    pub rtmr: [[u8; 48]; 4],
}

/// The least security versions of the peer's TDX module, each compared on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Svn {
    /// Those of the module below this migration TD.
    Own,
    /// These.
    AtLeast([u8; 16]),
}

/// The rules by which a migration TD judges its peer.
///
/// It is measured with the migration TD ([`Program::image`](crate::Program::image)), so that whoever trusts the
/// measurement trusts the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The measurements; `None` for a peer like this migration TD, with everything in TDINFO but the
    /// service TDs.
    pub measurements: Option<Measurements>,
    /// Bits that ATTRIBUTES must have.
    pub attributes_required: u64,
    /// Bits that ATTRIBUTES must not have. Bits 7:0 are those of a TD under debug.
    pub attributes_forbidden: u64,
    /// The security versions.
    pub svn: Svn,
}

impl Default for Policy {
    /// The same migration TD on a TDX module that is no older, and not under debug.
    fn default() -> Self {
        Self {
            measurements: None,
            attributes_required: 0,
            attributes_forbidden: 0xff,
            svn: Svn::Own,
        }
    }
}

/// The first rule that a peer breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// MRTD.
    #[error("MRTD is another")]
    Mrtd,
    /// One of the RTMRs.
    #[error("RTMR{0} is another")]
    Rtmr(u8),
    /// MRCONFIGID, MROWNER or MROWNERCONFIG.
    #[error("configuration or owner is another")]
    Owner,
    /// ATTRIBUTES or XFAM is not that of this migration TD.
    #[error("ATTRIBUTES or XFAM is another")]
    Features,
    /// A bit of ATTRIBUTES that must not be there, such as DEBUG.
    #[error("ATTRIBUTES has a forbidden bit")]
    Forbidden,
    /// A bit of ATTRIBUTES that must be there.
    #[error("ATTRIBUTES lacks a required bit")]
    Required,
    /// TEE_TCB_SVN, at this component.
    #[error("component {0} of TEE_TCB_SVN is too old")]
    Svn(u8),
    /// The launch digest of a migration agent.
    #[error("the launch digest is another")]
    Measurement,
    /// A bit of the policy of a migration agent that must not be there, such as DEBUG.
    #[error("the policy has a forbidden bit")]
    GuestPolicy,
    /// The VMPL of a migration agent.
    #[error("another VMPL than 0 asked for the report")]
    Vmpl,
    /// A part of the TCB below a migration agent.
    #[error("the TCB is too old")]
    Tcb,
}

impl Mismatch {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 29] = {
        let mut all = [Self::Mrtd; 29];
        all[1] = Self::Owner;
        all[2] = Self::Features;
        all[3] = Self::Forbidden;
        all[4] = Self::Required;
        let mut n = 0;
        while n < 4 {
            all[5 + n] = Self::Rtmr(n as u8);
            n += 1;
        }
        let mut n = 0;
        while n < 16 {
            all[9 + n] = Self::Svn(n as u8);
            n += 1;
        }
        all[25] = Self::Measurement;
        all[26] = Self::GuestPolicy;
        all[27] = Self::Vmpl;
        all[28] = Self::Tcb;
        all
    };

    /// Rule in bits 15:8, component in bits 7:0.
    pub(crate) const fn number(self) -> u64 {
        let (rule, component) = match self {
            Self::Mrtd => (1, 0),
            Self::Rtmr(n) => (2, n),
            Self::Owner => (3, 0),
            Self::Features => (4, 0),
            Self::Forbidden => (5, 0),
            Self::Required => (6, 0),
            Self::Svn(n) => (7, n),
            Self::Measurement => (8, 0),
            Self::GuestPolicy => (9, 0),
            Self::Vmpl => (10, 0),
            Self::Tcb => (11, 0),
        };
        rule << 8 | component as u64
    }

    #[cfg(any(feature = "host", test))]
    pub(crate) fn from_number(number: u64) -> Option<Self> {
        let component = number as u8;
        Some(match number >> 8 {
            1 => Self::Mrtd,
            2 => Self::Rtmr(component),
            3 => Self::Owner,
            4 => Self::Features,
            5 => Self::Forbidden,
            6 => Self::Required,
            7 => Self::Svn(component),
            8 => Self::Measurement,
            9 => Self::GuestPolicy,
            10 => Self::Vmpl,
            11 => Self::Tcb,
            _ => return None,
        })
    }
}

impl Policy {
    /// Judges a peer whose quote is authentic.
    ///
    /// # Errors
    /// The first rule that it breaks.
    pub fn judge(&self, own: &Identity, peer: &Identity) -> Result<(), Mismatch> {
        if peer.attributes & self.attributes_forbidden != 0 {
            return Err(Mismatch::Forbidden);
        }
        if peer.attributes & self.attributes_required != self.attributes_required {
            return Err(Mismatch::Required);
        }
        let like_own = Measurements {
            mrtd: own.mrtd,
            rtmr: own.rtmr,
        };
        let Measurements { mrtd, rtmr } = self.measurements.unwrap_or(like_own);
        if peer.mrtd != mrtd {
            return Err(Mismatch::Mrtd);
        }
        let pairs = (0u8..).zip(peer.rtmr.iter().zip(&rtmr));
        for (n, (has, wanted)) in pairs {
            if has != wanted {
                return Err(Mismatch::Rtmr(n));
            }
        }
        if self.measurements.is_none() {
            if (peer.attributes, peer.xfam) != (own.attributes, own.xfam) {
                return Err(Mismatch::Features);
            }
            if peer.measurement_ids != own.measurement_ids {
                return Err(Mismatch::Owner);
            }
        }
        let least = match self.svn {
            Svn::Own => own.tee_tcb_svn,
            Svn::AtLeast(least) => least,
        };
        let components = (0u8..).zip(peer.tee_tcb_svn.iter().zip(least));
        match components
            .into_iter()
            .find(|(_, (has, least))| *has < least)
        {
            Some((n, _)) => Err(Mismatch::Svn(n)),
            None => Ok(()),
        }
    }

    /// The rules as bytes, for the measurement.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match &self.measurements {
            None => out.push(0),
            Some(Measurements { mrtd, rtmr }) => {
                out.push(1);
                out.extend_from_slice(mrtd);
                out.extend_from_slice(rtmr.as_flattened());
            }
        }
        out.extend_from_slice(&self.attributes_required.to_le_bytes());
        out.extend_from_slice(&self.attributes_forbidden.to_le_bytes());
        match &self.svn {
            Svn::Own => out.push(0),
            Svn::AtLeast(least) => {
                out.push(1);
                out.extend_from_slice(least);
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Identity = Identity {
        tee_tcb_svn: [3; 16],
        mrseam: [1; 48],
        attributes: 1 << 28,
        xfam: 3,
        mrtd: [2; 48],
        measurement_ids: [[4; 48]; 3],
        rtmr: [[5; 48]; 4],
        report_data: [0; 64],
    };

    fn judged(policy: &Policy, change: impl FnOnce(&mut Identity)) -> Result<(), Mismatch> {
        let mut peer = OWN;
        change(&mut peer);
        policy.judge(&OWN, &peer)
    }

    #[test]
    fn a_peer_like_itself_is_taken_and_each_difference_is_named() {
        let policy = Policy::default();
        assert_eq!(judged(&policy, |_| ()), Ok(()));
        assert_eq!(judged(&policy, |peer| peer.report_data = [9; 64]), Ok(()));
        assert_eq!(judged(&policy, |peer| peer.mrseam = [9; 48]), Ok(()));
        assert_eq!(
            judged(&policy, |peer| peer.mrtd[47] ^= 1),
            Err(Mismatch::Mrtd)
        );
        for n in 0..4u8 {
            let found = judged(&policy, |peer| peer.rtmr[usize::from(n)][0] ^= 1);
            assert_eq!(found, Err(Mismatch::Rtmr(n)));
        }
        for n in 0..3 {
            let found = judged(&policy, |peer| peer.measurement_ids[n][0] ^= 1);
            assert_eq!(found, Err(Mismatch::Owner));
        }
        assert_eq!(
            judged(&policy, |peer| peer.xfam = 7),
            Err(Mismatch::Features)
        );
        assert_eq!(
            judged(&policy, |peer| peer.attributes |= 1 << 29),
            Err(Mismatch::Features)
        );
        for bit in 0..8 {
            let found = judged(&policy, |peer| peer.attributes |= 1 << bit);
            assert_eq!(found, Err(Mismatch::Forbidden));
        }
        for n in 0..16u8 {
            let older = judged(&policy, |peer| peer.tee_tcb_svn[usize::from(n)] = 2);
            assert_eq!(older, Err(Mismatch::Svn(n)));
            let newer = judged(&policy, |peer| peer.tee_tcb_svn[usize::from(n)] = 4);
            assert_eq!(newer, Ok(()));
        }
    }

    #[test]
    fn a_policy_may_ask_for_another_peer_than_itself() {
        let policy = Policy {
            measurements: Some(Measurements {
                mrtd: [8; 48],
                rtmr: [[0; 48]; 4],
            }),
            attributes_required: 1 << 28,
            svn: Svn::AtLeast([1; 16]),
            ..Policy::default()
        };
        let other = |peer: &mut Identity| {
            peer.mrtd = [8; 48];
            peer.rtmr = [[0; 48]; 4];
            peer.measurement_ids = [[0; 48]; 3];
            peer.tee_tcb_svn = [1; 16];
        };
        assert_eq!(judged(&policy, other), Ok(()));
        assert_eq!(judged(&policy, |_| ()), Err(Mismatch::Mrtd));
        let without = judged(&policy, |peer| {
            other(peer);
            peer.attributes = 0;
        });
        assert_eq!(without, Err(Mismatch::Required));
    }

    #[test]
    fn policies_that_differ_are_measured_differently() {
        let own = Policy::default();
        let others = [
            Policy {
                attributes_forbidden: 0,
                ..own
            },
            Policy {
                attributes_required: 1,
                ..own
            },
            Policy {
                svn: Svn::AtLeast([0; 16]),
                ..own
            },
            Policy {
                measurements: Some(Measurements {
                    mrtd: [0; 48],
                    rtmr: [[0; 48]; 4],
                }),
                ..own
            },
        ];
        for (n, policy) in others.iter().enumerate() {
            assert_ne!(policy.encode(), own.encode());
            assert!(
                others[..n]
                    .iter()
                    .all(|other| other.encode() != policy.encode())
            );
        }
    }
}
