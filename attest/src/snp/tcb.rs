//! Products and the versions of their firmware.

use std::fmt;

/// A generation of processors, which decides the layout of TCB versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Product {
    Milan,
    Genoa,
    Turin,
}

impl Product {
    /// Every product.
    pub const ALL: [Self; 3] = [Self::Milan, Self::Genoa, Self::Turin];

    /// The name in certificates and in addresses of AMD's key distribution service.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Milan => "Milan",
            Self::Genoa => "Genoa",
            Self::Turin => "Turin",
        }
    }

    /// The product of a name such as `Milan-B0` (VCEK) or `Turin`.
    pub fn from_name(name: &str) -> Option<Self> {
        let stem = name.split('-').next().unwrap_or_default();
        Self::ALL.into_iter().find(|product| product.name() == stem)
    }

    /// The product of a processor's family and model, extended parts added (CPUID leaf 1, EAX).
    /// Genoa's certificates also serve Bergamo and Siena.
    pub const fn from_cpuid(family: u8, model: u8) -> Option<Self> {
        match (family, model) {
            (0x19, 0x00..=0x0f) => Some(Self::Milan),
            (0x19, 0x10..=0x1f | 0xa0..=0xaf) => Some(Self::Genoa),
            (0x1a, 0x00..=0x11) => Some(Self::Turin),
            _ => None,
        }
    }

    /// Bytes of the chip id that are used; the rest are zeros.
    pub const fn chip_id_len(self) -> usize {
        match self {
            Self::Milan | Self::Genoa => 64,
            Self::Turin => 8,
        }
    }
}

/// Security versions of the parts that an SNP guest trusts (SNP firmware ABI, TCB_VERSION).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tcb {
    /// Firmware of the microcontroller; Turin only, otherwise 0.
    pub fmc: u8,
    /// Boot loader of the AMD SP.
    pub boot_loader: u8,
    /// Operating system of the AMD SP.
    pub tee: u8,
    /// SNP firmware.
    pub snp: u8,
    /// Lowest microcode patch level of all cores.
    pub microcode: u8,
}

impl Tcb {
    /// Takes a packed version apart. `None` if a reserved byte is not zero.
    pub fn from_bytes(product: Product, bytes: [u8; 8]) -> Option<Self> {
        let (tcb, reserved) = match (product, bytes) {
            (Product::Turin, [fmc, boot_loader, tee, snp, a, b, c, microcode]) => (
                Self {
                    fmc,
                    boot_loader,
                    tee,
                    snp,
                    microcode,
                },
                [a, b, c, 0],
            ),
            (_, [boot_loader, tee, a, b, c, d, snp, microcode]) => (
                Self {
                    fmc: 0,
                    boot_loader,
                    tee,
                    snp,
                    microcode,
                },
                [a, b, c, d],
            ),
        };
        (reserved == [0; 4]).then_some(tcb)
    }

    /// Packs the version as reports have it.
    pub fn to_bytes(self, product: Product) -> [u8; 8] {
        let Self {
            fmc,
            boot_loader,
            tee,
            snp,
            microcode,
        } = self;
        match product {
            Product::Turin => [fmc, boot_loader, tee, snp, 0, 0, 0, microcode],
            _ => [boot_loader, tee, 0, 0, 0, 0, snp, microcode],
        }
    }

    fn parts(self) -> [(&'static str, u8); 5] {
        [
            ("fmc", self.fmc),
            ("boot-loader", self.boot_loader),
            ("tee", self.tee),
            ("snp", self.snp),
            ("microcode", self.microcode),
        ]
    }

    /// The first part that is below `minimum`: its name, its version, and the minimum.
    pub fn below(self, minimum: Self) -> Option<(&'static str, u8, u8)> {
        let pairs = self.parts().into_iter().zip(minimum.parts());
        let mut below = pairs.filter(|((_, has), (_, least))| has < least);
        below
            .next()
            .map(|((name, has), (_, least))| (name, has, least))
    }

    /// Reads `boot-loader=3,snp=8`, in decimal; parts that are not named are 0.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut tcb = Self::default();
        for part in text.split(',') {
            let (name, value) = part
                .split_once('=')
                .ok_or_else(|| format!("`{part}` is not of the form NAME=VERSION"))?;
            let slot = match name.trim() {
                "fmc" => &mut tcb.fmc,
                "boot-loader" => &mut tcb.boot_loader,
                "tee" => &mut tcb.tee,
                "snp" => &mut tcb.snp,
                "microcode" => &mut tcb.microcode,
                other => return Err(format!("a TCB has no part `{other}`")),
            };
            *slot = value
                .trim()
                .parse()
                .map_err(|error| format!("`{value}` is no version: {error}"))?;
        }
        Ok(tcb)
    }
}

impl fmt::Display for Tcb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.parts().into_iter();
        let shown = parts.filter(|(name, version)| *name != "fmc" || *version > 0);
        let shown: Vec<_> = shown
            .map(|(name, version)| format!("{name}={version}"))
            .collect();
        f.write_str(&shown.join(","))
    }
}
