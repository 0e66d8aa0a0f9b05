// SPDX-License-Identifier: Apache-2.0

// Package clip shortens what clients write before it is repeated: in an answer, in the
// log, in an event. A client may send a megabyte of headers, each time, before anybody
// knows who it is, and each byte of it may become six in an answer or in the log.
package clip

import (
	"fmt"
	"strconv"
	"unicode/utf8"
)

const (
	// Max is how much of a value is repeated, in bytes. A character that has to be
	// escaped counts as long as it gets.
	Max = 256
	// maxEscaped is how long the formats that repeat a value make one byte of it:
	// "\ufffd".
	maxEscaped = 6
)

// String returns s, cut to [Max] with a note of its length.
func String(s string) string {
	left := Max
	for i, r := range s {
		if left -= width(r); left < 0 {
			return fmt.Sprintf("%s[cut, %d bytes]", s[:i], len(s))
		}
	}
	return s
}

// width returns how long r gets in a quoted string. Invalid bytes are U+FFFD in a range.
func width(r rune) int {
	switch {
	case r == '"', r == '\\':
		return 2
	case r == utf8.RuneError, !strconv.IsPrint(r):
		return maxEscaped
	}
	return utf8.RuneLen(r)
}

// Strings returns at most most of all, each cut as [String] does, with a note of how many
// there are.
func Strings(all []string, most int) []string {
	if all == nil {
		return nil
	}
	out := make([]string, 0, min(len(all), most+1))
	for i, s := range all {
		if i == most {
			return append(out, fmt.Sprintf("[cut, %d values]", len(all)))
		}
		out = append(out, String(s))
	}
	return out
}
