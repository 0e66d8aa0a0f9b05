// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"fmt"
	"image/color"
	"strconv"
	"unicode/utf8"

	uv "github.com/charmbracelet/ultraviolet"
	"github.com/charmbracelet/x/ansi"
	"github.com/go-json-experiment/json/jsontext"
)

// The attributes of a run, which the page's script and style know as well.
const (
	bold = 1 << iota
	faint
	italic
	underlined
	reversed
	struck
	// exact says that the run is one character of two cells, or one whose width browsers
	// choose themselves, and gets a box of as many cells.
	exact
	wide
)

// appendRow appends a line of a screen as JSON: a list of runs, each of which is its text
// and, if they are not the usual ones, the colors of text and background and the
// attributes. Blanks at the end are left out.
func appendRow(b []byte, line uv.Line) []byte {
	for len(line) > 0 && blank(&line[len(line)-1]) {
		line = line[:len(line)-1]
	}
	b = append(b, '[')
	var chars []byte
	for x := 0; x < len(line); {
		first := &line[x]
		look := lookOf(first)
		chars = append(chars[:0], content(first)...)
		x++
		for look.attrs&exact == 0 && x < len(line) && lookOf(&line[x]) == look {
			chars = append(chars, content(&line[x])...)
			x++
		}
		if first.Width == 2 && x < len(line) && line[x].Content == "" {
			x++ // its second half
		}
		if b[len(b)-1] != '[' {
			b = append(b, ',')
		}
		b = append(b, '[')
		b, _ = jsontext.AppendQuote(b, chars) // invalid UTF-8 is replaced
		if look != (style{}) {
			b = fmt.Appendf(b, ",%q,%q,%d", look.fg, look.bg, look.attrs)
		}
		b = append(b, ']')
	}
	return append(b, ']')
}

// blank reports whether cell looks like one that nothing was printed to.
func blank(cell *uv.Cell) bool {
	return (cell.Content == " " || cell.Content == "") && cell.Style.Bg == nil && cell.Style.Underline == uv.UnderlineNone &&
		cell.Style.Attrs&(uv.AttrReverse|uv.AttrStrikethrough) == 0
}

func content(cell *uv.Cell) string {
	if cell.Content == "" {
		return " "
	}
	return cell.Content[:wholeRunes([]byte(cell.Content))]
}

// style is how a cell looks. The colors are empty for the terminal's own, a number from 0 to
// 15, or like #a0b0c0.
type style struct {
	fg, bg string
	attrs  int
}

func lookOf(cell *uv.Cell) style {
	s := style{fg: colorOf(cell.Style.Fg), bg: colorOf(cell.Style.Bg)}
	for _, attr := range []struct {
		of  uint8
		are int
	}{{uv.AttrBold, bold}, {uv.AttrFaint, faint}, {uv.AttrItalic, italic}, {uv.AttrReverse, reversed}, {uv.AttrStrikethrough, struck}} {
		if cell.Style.Attrs&attr.of != 0 {
			s.attrs |= attr.are
		}
	}
	if cell.Style.Underline != uv.UnderlineNone {
		s.attrs |= underlined
	}
	switch {
	case cell.Width == 2:
		s.attrs |= exact | wide
	case !usual(cell.Content):
		s.attrs |= exact
	}
	return s
}

// usual reports whether the fonts of terminals have a character, in the width of all others.
func usual(content string) bool {
	r, size := utf8.DecodeRuneInString(content)
	return size == len(content) && (r < 0x250 || r >= 0x2500 && r < 0x25a0)
}

func colorOf(c color.Color) string {
	switch c := c.(type) {
	case nil:
		return ""
	case ansi.BasicColor:
		return strconv.Itoa(int(c) & 15)
	case ansi.IndexedColor:
		if c < 16 {
			return strconv.Itoa(int(c))
		}
	}
	r, g, b, _ := c.RGBA()
	return fmt.Sprintf("#%02x%02x%02x", r>>8, g>>8, b>>8)
}
