//! Policies of guests.

use super::bits;

bits! {
    /// Policy of an SEV or SEV-ES guest.
    SevPolicy: u32, ones 0, subfields 0xffff_0000 {
        /// Debugging is not allowed.
        NODBG = 0,
        /// Sharing the key with other guests is not allowed.
        NOKS = 1,
        /// SEV-ES is required.
        ES = 2,
        /// Sending to another platform is not allowed.
        NOSEND = 3,
        /// Sending is allowed inside the owner's domain only.
        DOMAIN = 4,
        /// Sending is allowed to genuine SEV platforms only.
        SEV = 5,
    }
}

impl SevPolicy {
    /// The same policy with the lowest version of the firmware, API_MAJOR and API_MINOR.
    pub const fn with_api(self, major: u8, minor: u8) -> Self {
        let [low, reserved, ..] = self.0;
        Self([low, reserved, major, minor])
    }

    /// Lowest version of the firmware: major and minor.
    pub const fn api(self) -> (u8, u8) {
        (self.0[2], self.0[3])
    }
}

bits! {
    /// Policy of an SNP guest. Bit 17, which must be 1, is set in each of them.
    SnpPolicy: u64, ones 0x2_0000, subfields 0xffff {
        /// SMT may be on.
        SMT = 16,
        /// A migration agent may be associated.
        MIGRATE_MA = 18,
        /// Debugging is allowed.
        DEBUG = 19,
        /// The guest may run on one socket only.
        SINGLE_SOCKET = 20,
        /// CXL memory may be used.
        CXL_ALLOW = 21,
        /// Memory must be encrypted with AES-256-XTS.
        MEM_AES_256_XTS = 22,
        /// RAPL must be disabled.
        RAPL_DIS = 23,
        /// Ciphertext hiding must be on.
        CIPHERTEXT_HIDING_DRAM = 24,
        /// Pages may not be swapped or moved.
        PAGE_SWAP_DISABLE = 25,
    }
}

impl SnpPolicy {
    /// The same policy with the lowest version of the firmware, ABI_MAJOR and ABI_MINOR.
    pub const fn with_abi(self, major: u8, minor: u8) -> Self {
        let mut bytes = self.0;
        (bytes[0], bytes[1]) = (minor, major);
        Self(bytes)
    }

    /// Lowest version of the firmware: major and minor.
    pub const fn abi(self) -> (u8, u8) {
        (self.0[1], self.0[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::FieldError;

    #[test]
    fn policies_take_every_defined_bit_and_no_other() {
        for bit in 0..32 {
            let policy = SevPolicy::new(1 << bit);
            assert_eq!(policy.is_ok(), !(6..16).contains(&bit), "bit {bit}");
        }
        for bit in 0..64 {
            let policy = SnpPolicy::new(1 << bit | 1 << 17);
            assert_eq!(policy.is_ok(), bit < 26, "bit {bit}");
        }
        let missing = FieldError::Missing {
            field: "SnpPolicy",
            value: 0x1_0000,
            bits: 0x2_0000,
        };
        assert_eq!(SnpPolicy::new(0x1_0000), Err(missing));
        assert_eq!(SnpPolicy::default().bits(), 0x2_0000);
    }

    #[test]
    fn versions_stand_beside_the_bits() {
        let sev = (SevPolicy::ES | SevPolicy::NODBG).with_api(1, 55);
        assert_eq!((sev.bits(), sev.api()), (0x3701_0005, (1, 55)));
        let snp = SnpPolicy::SMT.with_abi(1, 55);
        assert_eq!((snp.bits(), snp.abi()), (0x3_0137, (1, 55)));
        assert!(snp.contains(SnpPolicy::SMT) && !snp.contains(SnpPolicy::DEBUG));
    }
}
