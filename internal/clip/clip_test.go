// SPDX-License-Identifier: Apache-2.0

package clip

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func TestString_KeepsShortValues(t *testing.T) {
	for _, s := range []string{
		"", "/api/v1/pods", "älice", strings.Repeat("a", Max), strings.Repeat("ä", Max/2), "\xff", `a"b\c`,
		// The longest name of a node, a namespace or a host.
		strings.Repeat("a", 253),
	} {
		if got := String(s); got != s {
			t.Errorf("String(%q) = %q; want it unchanged", s, got)
		}
	}
}

func TestString_CutsWithANote(t *testing.T) {
	if got, want := String(strings.Repeat("a", 1000)), strings.Repeat("a", Max)+"[cut, 1000 bytes]"; got != want {
		t.Errorf("got %q; want %q", got, want)
	}
	if got := String(strings.Repeat("ä", 1000)); !utf8.ValidString(got) {
		t.Errorf("%q is cut within a character", got)
	}
}

// Whatever a client sends, and whatever repeats it, it stays below a kilobyte.
func TestString_EscapingIsBounded(t *testing.T) {
	for _, char := range []string{"a", "\xff", "\x00", "\n", `"`, `\`, "<", "ä", "\u0085", "\u2028", "\U000e0001", "�"} {
		s := String(strings.Repeat(char, 1_000_000))
		asJSON, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		asQuotedJSON, err := json.Marshal(strconv.Quote(s))
		if err != nil {
			t.Fatal(err)
		}
		logged, err := zapcore.NewJSONEncoder(zapcore.EncoderConfig{}).EncodeEntry(zapcore.Entry{}, []zapcore.Field{zap.String("uri", s)})
		if err != nil {
			t.Fatal(err)
		}
		for format, n := range map[string]int{"plain": len(s), "quoted": len(strconv.Quote(s)), "JSON": len(asJSON), "quoted in JSON": len(asQuotedJSON), "the log": logged.Len()} {
			// JSON for web pages makes six bytes of "<".
			if limit := maxEscaped*Max + 64; n > limit {
				t.Errorf("%q: %s: %d bytes; want at most %d", char, format, n, limit)
			}
		}
	}
}

func TestStrings(t *testing.T) {
	if got := Strings(nil, 2); got != nil {
		t.Errorf("got %q for nil", got)
	}
	for _, tt := range []struct{ all, want []string }{
		{[]string{}, []string{}},
		{[]string{"a", "b"}, []string{"a", "b"}},
		{[]string{"a", "b", "c"}, []string{"a", "b", "[cut, 3 values]"}},
		{[]string{strings.Repeat("a", 300)}, []string{strings.Repeat("a", Max) + "[cut, 300 bytes]"}},
	} {
		if diff := cmp.Diff(tt.want, Strings(tt.all, 2)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", tt.all, diff)
		}
	}
}
