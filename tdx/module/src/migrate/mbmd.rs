//! MBMD, the 48-byte header of every migration bundle.

use super::cipher::{Tag, Working};

/// Bytes of an MBMD.
pub(crate) const SIZE: usize = 48;
const AUTHENTICATED: usize = 32;

/// Kind of a bundle.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Kind {
    Immutable = 0,
    TdState = 1,
    VcpuState = 2,
    Memory = 16,
    EpochToken = 32,
    AbortToken = 33,
}

/// The last 8 bytes before the MAC, whose meaning depends on the kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Specific {
    /// Forward streams of the exporter and pages of SYS fields.
    Immutable { forward_streams: u16, sys_pages: u8 },
    /// Index of the vCPU.
    Vcpu { index: u16 },
    /// Entries of the GPA list.
    Memory { entries: u16 },
    /// Bundles of the whole session up to and with the token.
    Token { total: u64 },
    /// Nothing: TD state and abort token.
    None,
}

impl Specific {
    fn to_bytes(self) -> [u8; 8] {
        match self {
            Specific::Immutable {
                forward_streams,
                sys_pages,
            } => u64::from(forward_streams) | u64::from(sys_pages) << 32,
            Specific::Vcpu { index: n } | Specific::Memory { entries: n } => u64::from(n),
            Specific::Token { total } => total,
            Specific::None => 0,
        }
        .to_le_bytes()
    }

    /// Refuses bytes that must be 0 and are not.
    fn parse(kind: Kind, bytes: [u8; 8]) -> Option<Self> {
        let word = u64::from_le_bytes(bytes);
        let half = word as u16;
        let parsed = match kind {
            Kind::Immutable => Specific::Immutable {
                forward_streams: half,
                sys_pages: (word >> 32) as u8,
            },
            Kind::VcpuState => Specific::Vcpu { index: half },
            Kind::Memory => Specific::Memory { entries: half },
            Kind::EpochToken => Specific::Token { total: word },
            Kind::TdState | Kind::AbortToken => Specific::None,
        };
        (parsed.to_bytes() == bytes).then_some(parsed)
    }
}

/// An MBMD without size and MAC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mbmd {
    pub(crate) version: u16,
    pub(crate) stream: u16,
    pub(crate) kind: Kind,
    pub(crate) mb_counter: u32,
    pub(crate) epoch: u32,
    pub(crate) iv_counter: u64,
    pub(crate) specific: Specific,
}

impl Mbmd {
    /// The first 32 bytes.
    fn header(&self) -> [u8; AUTHENTICATED] {
        let mut b = [0; AUTHENTICATED];
        b[0..2].copy_from_slice(&(SIZE as u16).to_le_bytes());
        b[2..4].copy_from_slice(&self.version.to_le_bytes());
        b[4..6].copy_from_slice(&self.stream.to_le_bytes());
        b[6] = self.kind as u8;
        b[8..12].copy_from_slice(&self.mb_counter.to_le_bytes());
        b[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        b[16..24].copy_from_slice(&self.iv_counter.to_le_bytes());
        b[24..32].copy_from_slice(&self.specific.to_bytes());
        b
    }

    /// Data that the MAC covers beside the bundle's text. Stream and IV counter count as 0 there: they are in the
    /// IV already.
    pub(crate) fn aad(&self) -> [u8; AUTHENTICATED] {
        Mbmd {
            stream: 0,
            iv_counter: 0,
            ..*self
        }
        .header()
    }

    pub(crate) fn with_mac(&self, mac: &Tag) -> [u8; SIZE] {
        let mut b = [0; SIZE];
        b[..AUTHENTICATED].copy_from_slice(&self.header());
        b[AUTHENTICATED..].copy_from_slice(mac);
        b
    }

    /// The MBMD of a bundle that has no text, or whose parts are separate messages.
    pub(crate) fn sealed(&self, key: &Working) -> [u8; SIZE] {
        let mac = key.seal(self.iv_counter, self.stream, &self.aad(), &mut []);
        self.with_mac(&mac)
    }
}

/// An MBMD as the host handed it in, with its MAC unchecked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) mbmd: Mbmd,
    pub(crate) mac: Tag,
}

impl Received {
    /// Reads an MBMD of one kind and version. `None` if it is none: another size, kind or version, or a byte
    /// that must be 0 and is not.
    pub(crate) fn parse(bytes: &[u8; SIZE], kind: Kind, version: u16) -> Option<Self> {
        let u16_at = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        let word_at = |i: usize| -> [u8; 8] { core::array::from_fn(|n| bytes[i + n]) };
        let counters = u64::from_le_bytes(word_at(8));
        let fits = u16_at(0) as usize == SIZE
            && u16_at(2) == version
            && bytes[6] == kind as u8
            && bytes[7] == 0;
        if !fits {
            return None;
        }
        Some(Received {
            mbmd: Mbmd {
                version,
                stream: u16_at(4),
                kind,
                mb_counter: counters as u32,
                epoch: (counters >> 32) as u32,
                iv_counter: u64::from_le_bytes(word_at(16)),
                specific: Specific::parse(kind, word_at(24))?,
            },
            mac: core::array::from_fn(|n| bytes[AUTHENTICATED + n]),
        })
    }

    /// Returns true if the MAC is that of a bundle without text.
    pub(crate) fn is_authentic(&self, key: &Working) -> bool {
        let m = &self.mbmd;
        key.open(m.iv_counter, m.stream, &m.aad(), &mut [], &self.mac)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KINDS: [Kind; 6] = [
        Kind::Immutable,
        Kind::TdState,
        Kind::VcpuState,
        Kind::Memory,
        Kind::EpochToken,
        Kind::AbortToken,
    ];

    fn any_mbmd() -> impl Strategy<Value = Mbmd> {
        (
            0..KINDS.len(),
            any::<(u16, u16, u32, u32, u64)>(),
            any::<(u64, u16, u8)>(),
        )
            .prop_map(
                |(
                    kind,
                    (version, stream, mb_counter, epoch, iv_counter),
                    (total, n, sys_pages),
                )| {
                    let kind = KINDS[kind];
                    let specific = match kind {
                        Kind::Immutable => Specific::Immutable {
                            forward_streams: n,
                            sys_pages,
                        },
                        Kind::VcpuState => Specific::Vcpu { index: n },
                        Kind::Memory => Specific::Memory { entries: n },
                        Kind::EpochToken => Specific::Token { total },
                        Kind::TdState | Kind::AbortToken => Specific::None,
                    };
                    Mbmd {
                        version,
                        stream,
                        kind,
                        mb_counter,
                        epoch,
                        iv_counter,
                        specific,
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(mbmd in any_mbmd()) {
            let key = Working::new([1, 2, 3, 4]);
            let read = Received::parse(&mbmd.sealed(&key), mbmd.kind, mbmd.version).expect("an MBMD");
            prop_assert_eq!(read.mbmd, mbmd);
            prop_assert!(read.is_authentic(&key));
            prop_assert!(!read.is_authentic(&Working::new([1, 2, 3, 5])));
        }

        #[test]
        fn any_changed_bit_is_refused(mbmd in any_mbmd(), bit in 0..SIZE * 8) {
            let key = Working::new([1, 2, 3, 4]);
            let mut bytes = mbmd.sealed(&key);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let read = Received::parse(&bytes, mbmd.kind, mbmd.version);
            prop_assert!(!read.is_some_and(|r| r.is_authentic(&key)));
        }

        #[test]
        fn arbitrary_bytes_are_read_without_panic(bytes in proptest::array::uniform32(any::<u8>()), kind in 0..6usize) {
            let mut all = [0; SIZE];
            all[..32].copy_from_slice(&bytes);
            all[..2].copy_from_slice(&48u16.to_le_bytes());
            let _ = Received::parse(&all, KINDS[kind], 0);
        }
    }

    /// A token recorded from module 1.5.05, but for its MAC.
    #[test]
    fn the_layout_is_the_recorded_one() {
        let token = Mbmd {
            version: 0,
            stream: 0,
            kind: Kind::EpochToken,
            mb_counter: 0,
            epoch: 1,
            iv_counter: 2,
            specific: Specific::Token { total: 4 },
        };
        let recorded = "3000000000002000000000000100000002000000000000000400000000000000";
        assert_eq!(hex::encode(token.header()), recorded);
    }
}
