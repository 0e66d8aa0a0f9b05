// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/sessionrecording"
)

func TestCast_EventsHaveTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got written
		s := newSink(&got, nil, neverFails(t))
		c := newCast(sessionrecording.CastHeader{Command: "sh"}, s)
		for _, step := range []func() error{
			func() error { return c.resize(100, 30) },
			func() error { return c.output(stdout, []byte(`a "quoted" <b> & c`+"\r\n\x1b[1m")) },
			func() error { return c.resize(120, 40) },
			func() error { return c.output(stderr, []byte("end")) },
		} {
			if err := step(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(1500 * time.Millisecond) // the bubble's clock jumps
		}
		if err := errors.Join(c.finish(), s.close()); err != nil {
			t.Fatal(err)
		}
		header, events, _ := strings.Cut(got.String(), "\n")
		var h map[string]any
		if err := json.Unmarshal([]byte(header), &h); err != nil {
			t.Fatal(err)
		}
		if h["version"] != 2.0 || h["width"] != 100.0 || h["height"] != 30.0 || h["timestamp"] != 946684800.0 || h["command"] != "sh" {
			t.Errorf("got header %s", header)
		}
		want := `[1.500000, "o", "a \"quoted\" <b> & c\r\n\u001b[1m"]` + "\n" + `[3.000000, "r", "120x40"]` + "\n" + `[4.500000, "o", "end"]` + "\n"
		if diff := cmp.Diff(want, events); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	})
}

// Programs may split characters, independently on each stream.
func TestCast_JoinsSplitCharacters(t *testing.T) {
	const text = "grüße, 日本 🙂!"
	for size := 1; size <= len(text); size++ {
		var got written
		s := newSink(&got, nil, neverFails(t))
		c := newCast(sessionrecording.CastHeader{}, s)
		for _, piece := range pieces(text, func() int { return size }) {
			for _, stream := range []stream{stdout, stderr} {
				if err := c.output(stream, []byte(piece)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := errors.Join(c.finish(), s.close()); err != nil {
			t.Fatal(err)
		}
		if out := outputOf(t, got.String()); len(out) != 2*len(text) || strings.Contains(out, "\ufffd") {
			t.Errorf("in pieces of %d: got %q", size, out)
		}
	}
}

// Invalid UTF-8 is replaced, and does not affect what follows.
func TestCast_ReplacesInvalidUTF8(t *testing.T) {
	var got written
	s := newSink(&got, nil, neverFails(t))
	c := newCast(sessionrecording.CastHeader{}, s)
	for _, piece := range []string{"a\xff\xfe", "\x80b", "\xe6\x97", "c\xe6"} {
		if err := c.output(stdout, []byte(piece)); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(c.finish(), s.close()); err != nil {
		t.Fatal(err)
	}
	out := outputOf(t, got.String())
	if letters := strings.ReplaceAll(out, "\ufffd", ""); letters != "abc" || !strings.HasSuffix(out, "\ufffd") {
		t.Errorf("got %q; want abc, with replacements between and behind", out)
	}
}

// outputOf returns what is printed in a recording.
func outputOf(t *testing.T, cast string) string {
	t.Helper()
	out := ""
	for _, line := range strings.Split(strings.TrimSuffix(cast, "\n"), "\n")[1:] {
		var event []any
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		out += event[2].(string)
	}
	return out
}

// A session that prints nothing has a recording as well.
func TestCast_SilentSessionHasHeader(t *testing.T) {
	var got written
	s := newSink(&got, nil, neverFails(t))
	c := newCast(sessionrecording.CastHeader{}, s)
	if err := errors.Join(c.finish(), s.close()); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(got.String(), `{"version":2,"width":80,"height":24,`) {
		t.Errorf("got %q", got.String())
	}
}

// BenchmarkOutput records a frame of 32 KiB.
func BenchmarkOutput(b *testing.B) {
	s := newSink(io.Discard, nil, func(error) {})
	c := newCast(sessionrecording.CastHeader{}, s)
	frame := bytes.Repeat([]byte("forty-one letters of text, and a line end\n"), 32<<10/42)
	b.SetBytes(int64(len(frame)))
	b.ReportAllocs()
	for b.Loop() {
		if err := c.output(stdout, frame); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.close(); err != nil {
		b.Fatal(err)
	}
}
