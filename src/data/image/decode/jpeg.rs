//! Decodes and encodes JPEGs by libjpeg-turbo's TurboJPEG interface (libjpeg-turbo.org, `turbojpeg.h`). The library is built from
//! source and linked statically.

use crate::data::image::pixels::{Pixel, Pixels, Region};
use anyhow::{Result, anyhow, ensure};
use std::ffi::{CStr, c_int};
use turbojpeg_sys as tj;

/// Decodes JPEGs, and reuses its memory from image to image.
pub struct Jpeg {
    handle: tj::tjhandle,
    height: usize,
    width: usize,
    /// The offset in the opened file, in bytes, at which the header holds the image's height. None if the height was not found.
    height_offset: Option<usize>,
    /// A copy of the file whose header says a lower height, so that the rows below the wanted part are not decoded.
    lowered: Vec<u8>,
    /// Whether the header that TurboJPEG read last was the header of `lowered`.
    last_header_is_lowered: bool,
}

// SAFETY: the handle is a heap object that no other thread knows. The only state that TurboJPEG keeps per thread is an error text.
// It is read only directly after a failed call, on the same thread.
unsafe impl Send for Jpeg {}

impl Drop for Jpeg {
    fn drop(&mut self) {
        // SAFETY: the handle came from tj3Init and is destroyed once.
        unsafe { tj::tj3Destroy(self.handle) }
    }
}

/// A progressive JPEG with more scans is refused. Real files have about ten scans, but a hostile file may have thousands.
const MOST_SCANS: c_int = 100;
/// libjpeg may allocate at most this many megabytes for the coefficients of a progressive JPEG. This is enough for the largest
/// image that is read, even if it has three channels without chroma subsampling.
const MOST_MEMORY: c_int = 600;
/// Memory of at most this many bytes is kept for the next copy of a file.
const MOST_KEPT: usize = 16 << 20;

/// On each side, the decoded part extends beyond the wanted region by at least this many pixels of the reduced image, unless the
/// image ends there.
const MARGIN: usize = 2;

impl Jpeg {
    pub fn new() -> Result<Jpeg> {
        Ok(Jpeg {
            handle: decompressor()?,
            height: 0,
            width: 0,
            height_offset: None,
            lowered: Vec::new(),
            last_header_is_lowered: false,
        })
    }

    /// Reads the header of a file, and returns the image's (height, width). Like Pillow, it refuses a file whose end is missing,
    /// but accepts other damage to the data of the pixels.
    pub fn open(&mut self, bytes: &[u8]) -> Result<(usize, usize)> {
        // An image without Huffman tables, such as a frame of Motion JPEG, needs the default tables of the JPEG standard. A new
        // decompressor uses these defaults, but an old decompressor would use the tables of its last image. Creating a decompressor
        // takes less than a microsecond.
        let last = std::mem::replace(&mut self.handle, decompressor()?);
        // SAFETY: the handle came from tj3Init and is destroyed once.
        unsafe { tj::tj3Destroy(last) };
        // SAFETY: the handle is a decompressor, and the pointer and the length are those of one slice.
        self.check(unsafe { tj::tj3DecompressHeader(self.handle, bytes.as_ptr(), bytes.len() as tj::size_t) })?;
        self.last_header_is_lowered = false;
        (self.height, self.width) = (self.get(tj::TJPARAM_TJPARAM_JPEGHEIGHT), self.get(tj::TJPARAM_TJPARAM_JPEGWIDTH));
        let offsets = find_offsets(bytes);
        if let Some(Offsets { scan, .. }) = offsets {
            ensure!(bytes[scan..].windows(2).rev().any(|pair| pair == END), "not a whole JPEG: its end is missing");
        }
        let has_height = |&at: &usize| bytes[at..at + 2] == (self.height as u16).to_be_bytes();
        self.height_offset = offsets.map(|offsets| offsets.height).filter(has_height);
        Ok((self.height, self.width))
    }

    /// Decodes a region of the opened image, and pixels around the region, at 1/`reduction` (1, 2, 4 or 8) of the image's height
    /// and width. `region` is in pixels of the stored image. Returns the column and row of the reduced image at which the decoded
    /// part begins.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        region: Region,
        reduction: usize,
        out: &mut Pixels,
    ) -> Result<(usize, usize)> {
        if std::mem::take(&mut self.last_header_is_lowered) {
            // SAFETY: the handle is a decompressor, and the pointer and the length are those of one slice.
            self.check(unsafe { tj::tj3DecompressHeader(self.handle, bytes.as_ptr(), bytes.len() as tj::size_t) })?;
        }
        let scaled = |length: usize| length.div_ceil(reduction);
        let scaling = tj::tjscalingfactor { num: 1, denom: reduction as c_int };
        // SAFETY: the handle is a decompressor.
        self.check(unsafe { tj::tj3SetScalingFactor(self.handle, scaling) })?;
        let (height, width) = (scaled(self.height), scaled(self.width));
        // The upsampling of chroma reads one pixel beyond the region. With the margin, the pixels of the region are the same as if
        // the whole image were decoded.
        let right = (scaled(region.left + region.width) + MARGIN).min(width);
        let bottom = (scaled(region.top + region.height) + MARGIN).min(height);
        let left = (region.left / reduction).saturating_sub(MARGIN) / self.unit(reduction) * self.unit(reduction);
        let top = (region.top / reduction).saturating_sub(MARGIN);
        // TurboJPEG cannot crop an image with an unknown kind of chroma subsampling. Such an image is decoded whole.
        let known = self.get_signed(tj::TJPARAM_TJPARAM_SUBSAMP) >= 0;
        let (left, top, right, bottom) = if known { (left, top, right, bottom) } else { (0, 0, width, height) };
        let part = if (left, top, right, bottom) == (0, 0, width, height) {
            tj::tjregion { x: 0, y: 0, w: 0, h: 0 }
        } else {
            let (w, h) = ((right - left) as c_int, (bottom - top) as c_int);
            tj::tjregion { x: left as c_int, y: top as c_int, w, h }
        };
        // SAFETY: the handle is a decompressor.
        self.check(unsafe { tj::tj3SetCroppingRegion(self.handle, part) })?;
        out.resize(bottom - top, right - left);
        self.last_header_is_lowered = self.lower(bytes, bottom * reduction);
        let bytes = if self.last_header_is_lowered { &self.lowered } else { bytes };
        let colours = self.get(tj::TJPARAM_TJPARAM_COLORSPACE) as tj::TJCS;
        let cmyk = [tj::TJCS_TJCS_CMYK, tj::TJCS_TJCS_YCCK].contains(&colours);
        let format = if cmyk { tj::TJPF_TJPF_CMYK } else { tj::TJPF_TJPF_RGBX };
        // SAFETY: `out` has (bottom − top) rows of (right − left) pixels of four bytes. This is the size of the cropping region, or
        // of the whole reduced image if there is no cropping. A pitch of 0 means rows without gaps.
        self.check(unsafe {
            tj::tj3Decompress8(
                self.handle,
                bytes.as_ptr(),
                bytes.len() as tj::size_t,
                out.rgbx.as_mut_ptr().cast(),
                0,
                format,
            )
        })?;
        if cmyk {
            out.rgbx.iter_mut().for_each(|pixel| *pixel = rgb_of_inverted_cmyk(*pixel));
        }
        Ok((left, top))
    }

    /// Copies the file to `lowered`, and lowers the image's height in the copy to `bottom`, rounded up to whole coding units
    /// (MCUs). So the rows below are not decoded. Does nothing and returns false if less than one whole coding unit would be saved,
    /// or if `open` did not find the height in the file.
    fn lower(&mut self, bytes: &[u8], bottom: usize) -> bool {
        let heights = [8, 8, 16, 8, 16, 8, 32];
        let unit = heights.get(self.get(tj::TJPARAM_TJPARAM_SUBSAMP)).copied().unwrap_or(32);
        let height = bottom.next_multiple_of(unit);
        let Some(at) = self.height_offset.filter(|_| height + unit <= self.height) else { return false };
        if self.lowered.capacity() > MOST_KEPT {
            self.lowered = Vec::new();
        }
        self.lowered.clear();
        self.lowered.extend_from_slice(bytes);
        self.lowered[at..at + 2].copy_from_slice(&(height as u16).to_be_bytes());
        true
    }

    /// The width of a coding unit (MCU) in pixels of the reduced image. A decoded part must begin at a multiple of this width.
    fn unit(&self, reduction: usize) -> usize {
        let widths = [8, 16, 16, 8, 8, 32, 8];
        let subsampling = self.get(tj::TJPARAM_TJPARAM_SUBSAMP);
        (widths.get(subsampling).copied().unwrap_or(8) / reduction).max(1)
    }

    fn get(&self, parameter: tj::TJPARAM) -> usize {
        self.get_signed(parameter).max(0) as usize
    }

    fn get_signed(&self, parameter: tj::TJPARAM) -> c_int {
        // SAFETY: the handle is live, and TurboJPEG checks the parameter's number.
        unsafe { tj::tj3Get(self.handle, parameter as c_int) }
    }

    /// Turns the return value of a TurboJPEG call into a result. Accepts a warning, as Pillow does, unless the warning says that
    /// the file ended before the image. After a warning, TurboJPEG also reports errors with the code of a warning, so the text must
    /// be a known warning too.
    fn check(&self, returned: c_int) -> Result<()> {
        if returned == 0 {
            return Ok(());
        }
        // SAFETY: the handle is live.
        let warning = unsafe { tj::tj3GetErrorCode(self.handle) } as tj::TJERR == tj::TJERR_TJERR_WARNING;
        let text = error_text(self.handle);
        if warning && WARNINGS.iter().any(|warning| text.starts_with(warning)) {
            Ok(())
        } else {
            Err(anyhow!("not a whole JPEG: {text}"))
        }
    }
}

/// The beginnings of libjpeg's warnings about a file (`jerror.h`, JWRN), except «Premature end of JPEG file».
const WARNINGS: [&str; 5] = [
    "Corrupt JPEG data:",
    "Inconsistent progression sequence",
    "Invalid SOS parameters",
    "Unknown Adobe color transform",
    "Warning: unknown JFIF revision",
];

/// The marker that ends a JPEG.
const END: [u8; 2] = [0xFF, 0xD9];

/// Offsets in a JPEG file, in bytes.
#[derive(Clone, Copy)]
struct Offsets {
    /// Where the frame's header holds the image's height.
    height: usize,
    /// Where the first scan begins, after its marker.
    scan: usize,
}

/// Finds the offsets in a file. Returns none if the file has no scan, or no frame before its first scan. libjpeg reports such a
/// fault.
fn find_offsets(bytes: &[u8]) -> Option<Offsets> {
    let (mut at, mut height) = (2, None);
    loop {
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xFF)?;
        at += bytes[at..].iter().position(|&byte| byte != 0xFF)?;
        let marker = bytes[at];
        at += 1;
        match marker {
            // These bytes are no markers, or they are markers without a segment.
            0x00 | 0x01 | 0xD0..=0xD8 => continue,
            0xD9 => return None,
            0xDA => return Some(Offsets { height: height.filter(|&height| height + 2 <= at)?, scan: at }),
            // A frame starts here, unless the marker is DHT, JPG or DAC.
            0xC0..=0xCF if ![0xC4, 0xC8, 0xCC].contains(&marker) => height = Some(at + 3),
            _ => {}
        }
        at += usize::from(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    }
}

/// Converts CMYK to RGB as Pillow does (`Convert.c: cmyk2rgb`). As Pillow does, this assumes that the file holds inverted CMYK,
/// because Adobe's programs write CMYK so.
fn rgb_of_inverted_cmyk([c, m, y, k]: Pixel) -> Pixel {
    let ink = |inverted: u8| {
        let product = u32::from(255 - inverted) * u32::from(k) + 128;
        k.saturating_sub(((product + (product >> 8)) >> 8) as u8)
    };
    [ink(c), ink(m), ink(y), 255]
}

/// Encodes rows of RGB bytes as a baseline JPEG with 4:2:0 chroma subsampling. `quality` is from 1 to 100.
///
/// # Errors
/// The number of bytes is not 3 · height · width, the image has no pixels, or a side is longer than libjpeg's limit of 65,500
/// pixels.
pub fn encode(rgb: &[u8], height: usize, width: usize, quality: u8) -> Result<Vec<u8>> {
    ensure!(rgb.len() == 3 * height * width, "{} bytes are not {height}×{width} RGB pixels", rgb.len());
    let handle = init(tj::TJINIT_TJINIT_COMPRESS)?;
    let encoded = compress(handle, rgb, height, width, quality);
    // SAFETY: the handle came from tj3Init and is destroyed once.
    unsafe { tj::tj3Destroy(handle) }
    encoded
}

fn compress(handle: tj::tjhandle, rgb: &[u8], height: usize, width: usize, quality: u8) -> Result<Vec<u8>> {
    set(handle, tj::TJPARAM_TJPARAM_QUALITY, quality.into())?;
    set(handle, tj::TJPARAM_TJPARAM_SUBSAMP, tj::TJSAMP_TJSAMP_420)?;
    let (mut buffer, mut size) = (std::ptr::null_mut(), 0);
    // SAFETY: the slice holds height · width pixels of three bytes, and TurboJPEG allocates the buffer.
    let returned = unsafe {
        tj::tj3Compress8(
            handle,
            rgb.as_ptr(),
            width as c_int,
            0,
            height as c_int,
            tj::TJPF_TJPF_RGB,
            &mut buffer,
            &mut size,
        )
    };
    let result = if returned == 0 {
        // SAFETY: after success, the buffer holds `size` bytes.
        Ok(unsafe { std::slice::from_raw_parts(buffer, size as usize) }.to_vec())
    } else {
        Err(anyhow!("cannot compress {width} × {height} pixels: {}", error_text(handle)))
    };
    // SAFETY: the buffer was allocated by TurboJPEG, or is null.
    unsafe { tj::tj3Free(buffer.cast()) }
    result
}

fn init(kind: tj::TJINIT) -> Result<tj::tjhandle> {
    // SAFETY: TurboJPEG checks the kind, and returns null for an error.
    let handle = unsafe { tj::tj3Init(kind as c_int) };
    ensure!(!handle.is_null(), "TurboJPEG cannot start: out of memory");
    Ok(handle)
}

/// A new decompressor with the limits for hostile files.
fn decompressor() -> Result<tj::tjhandle> {
    let handle = init(tj::TJINIT_TJINIT_DECOMPRESS)?;
    set(handle, tj::TJPARAM_TJPARAM_SCANLIMIT, MOST_SCANS)?;
    set(handle, tj::TJPARAM_TJPARAM_MAXMEMORY, MOST_MEMORY)?;
    Ok(handle)
}

fn set(handle: tj::tjhandle, parameter: tj::TJPARAM, value: c_int) -> Result<()> {
    // SAFETY: the handle is live, and TurboJPEG checks the parameter and the value.
    let returned = unsafe { tj::tj3Set(handle, parameter as c_int, value) };
    ensure!(returned == 0, "TurboJPEG: {}", error_text(handle));
    Ok(())
}

fn error_text(handle: tj::tjhandle) -> String {
    // SAFETY: the handle is live. The text is a C string of the handle or of this thread, and it is copied at once.
    unsafe { CStr::from_ptr(tj::tj3GetErrorStr(handle)) }.to_string_lossy().into_owned()
}
