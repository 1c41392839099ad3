//! Images for tests, assembled here. The integration tests use this file too.

/// Assembles an ELF file with one loadable segment.
pub(crate) fn elf(class64: bool, at: u64, entry: u64, code: &[u8], memory: u64) -> Vec<u8> {
    let word = |value: u64| {
        let bytes = value.to_le_bytes();
        bytes[..if class64 { 8 } else { 4 }].to_vec()
    };
    let (header, program): (u16, u16) = if class64 { (64, 56) } else { (52, 32) };
    let machine: u16 = if class64 { 62 } else { 3 };
    let mut file = vec![0x7f, b'E', b'L', b'F', 1 + u8::from(class64), 1, 1];
    file.resize(16, 0);
    for half in [2, machine] {
        file.extend(u16::to_le_bytes(half));
    }
    file.extend(1_u32.to_le_bytes());
    for value in [entry, header.into(), 0] {
        file.extend(word(value));
    }
    file.extend(0_u32.to_le_bytes());
    for half in [header, program, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let offset = u64::from(header + program);
    let (load, flags) = (1_u32.to_le_bytes(), 7_u32.to_le_bytes());
    file.extend(load);
    if class64 {
        file.extend(flags);
    }
    for value in [offset, at, at, code.len() as u64, memory] {
        file.extend(word(value));
    }
    if !class64 {
        file.extend(flags);
    }
    file.extend(word(0x1000));
    assert_eq!(file.len() as u64, offset);
    file.extend(code);
    file
}

/// Assembles a bzImage by protocol 2.15 with code at its 32-bit and its 64-bit entry.
pub(crate) fn bzimage(entry32: &[u8], entry64: &[u8], long: bool) -> Vec<u8> {
    let mut file = vec![0; 2 * 512];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable_kernel
    put(0x236, &u16::from(long).to_le_bytes()); // xloadflags
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000_u32.to_le_bytes()); // init_size
    file.extend(entry32);
    file.resize(2 * 512 + 0x200, 0);
    file.extend(entry64);
    file
}
