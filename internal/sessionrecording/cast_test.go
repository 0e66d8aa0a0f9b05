// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/sessionrecording"
)

// written is a buffer that may be read while a sink writes to it.
type written struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements [io.Writer].
func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

func (w *written) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.String()
}

// neverFails is for sinks that do not.
func neverFails(t *testing.T) func(error) {
	return func(err error) { t.Errorf("the sink failed: %v", err) }
}

func TestCastIsWrittenAsItHappens(t *testing.T) {
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

// Characters are split by whoever writes them, and the streams are two.
func TestCharactersInPieces(t *testing.T) {
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

// What is no text is marked, and breaks nothing that follows.
func TestBytesThatAreNoText(t *testing.T) {
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
		t.Errorf("got %q; want abc, with marks between and behind", out)
	}
}

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

// A session of which nothing was said is a recording all the same.
func TestSilentSessionHasAHeader(t *testing.T) {
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

// What the API server sends on a stream that is no output would not be in the
// recording, and a client may show it all the same.
func TestWhatIsNoOutputIsNotPrinted(t *testing.T) {
	for what, passes := range map[stream]bool{stdout: true, stderr: true, errs: true, stdin: false, resize: false} {
		s := &Session{cast: newCast(sessionrecording.CastHeader{})}
		if err := (*terminal)(s).fromServer(what, []byte("x")); (err == nil) != passes {
			t.Errorf("%s: got error %v; want one: %v", what, err, !passes)
		}
	}
}

func TestSizes(t *testing.T) {
	for _, tt := range []struct {
		name   string
		pieces []string
		want   [][2]uint16
		fails  bool
	}{
		{"one", []string{`{"Width":1,"Height":2}`}, [][2]uint16{{1, 2}}, false},
		{"two at once", []string{`{"Width":1,"Height":2}` + "\n" + `{"Width":3,"Height":4}` + "\n"}, [][2]uint16{{1, 2}, {3, 4}}, false},
		{"in pieces", []string{`{"Wid`, `th":1,`, `"Height":2}{"W`, `idth":3,"Height":4}`}, [][2]uint16{{1, 2}, {3, 4}}, false},
		{"none", []string{`{"Width":0,"Height":0}`, `{}`}, nil, false},
		{"no JSON", []string{`80x24`}, nil, true},
		{"too large a number", []string{`{"Width":70000,"Height":2}`}, nil, true},
		{"without end", []string{`{"Width":"` + strings.Repeat("1", maxSize+1)}, nil, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := sizes{known: make(chan struct{})}
			var got [][2]uint16
			var err error
			for _, piece := range tt.pieces {
				err = errors.Join(err, s.add([]byte(piece), func(w, h uint16) error {
					got = append(got, [2]uint16{w, h})
					return nil
				}))
			}
			if (err != nil) != tt.fails {
				t.Errorf("got error %v", err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("sizes (-want +got):\n%s", diff)
			}
		})
	}
}

// The recording begins with the size of the terminal if that is said in time, and
// what is printed does not wait for ever.
func TestOutputWaitsForTheSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := sizes{known: make(chan struct{})}
		began := time.Now()
		s.wait(nil)
		if took := time.Since(began); took != sizeTimeout {
			t.Errorf("it took %v; want %v", took, sizeTimeout)
		}
		s.wait(nil)
		if took := time.Since(began); took != sizeTimeout {
			t.Errorf("the second time took %v as well", took-sizeTimeout)
		}

		s = sizes{known: make(chan struct{})}
		began = time.Now()
		go func() {
			time.Sleep(300 * time.Millisecond) // of the bubble's clock
			_ = s.add([]byte(`{"Width":1,"Height":2}`), func(uint16, uint16) error { return nil })
		}()
		s.wait(nil)
		if took := time.Since(began); took != 300*time.Millisecond {
			t.Errorf("it took %v; want 300ms", took)
		}
	})
}

// What a sink keeps is bounded, and one that takes nothing fails in time.
func TestSinkThatStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		failed := make(chan error, 2)
		s := newSink(w, nil, func(err error) {
			failed <- err
			w.Close()
		})
		began := time.Now()
		wrote := 0
		line := bytes.Repeat([]byte("x"), 1000)
		var err error
		for err == nil {
			if err = s.write(line); err == nil {
				wrote += len(line)
			}
		}
		if took := time.Since(began); took != stall {
			t.Errorf("it failed after %v; want %v", took, stall)
		}
		if wrote > 2*maxPending {
			t.Errorf("%d bytes are kept; want at most %d", wrote, 2*maxPending)
		}
		if got := <-failed; !errors.Is(got, errStalled) {
			t.Errorf("it failed with %v", got)
		}
		if err := s.close(); !errors.Is(err, errStalled) {
			t.Errorf("closing says %v", err)
		}
		r.Close()
	})
}

// One that is slow holds up who writes, and fails nobody.
func TestSinkThatIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, w := io.Pipe()
		s := newSink(w, nil, neverFails(t))
		read := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			b := make([]byte, chunk)
			for {
				time.Sleep(time.Second) // of the bubble's clock
				n, err := r.Read(b)
				if read += n; err != nil {
					return
				}
			}
		}()
		line := bytes.Repeat([]byte("x"), 1000)
		for range 2000 {
			if err := s.write(line); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.close(); err != nil {
			t.Fatal(err)
		}
		w.Close()
		<-done
		if read != 2000*1000 {
			t.Errorf("%d bytes arrived; want all", read)
		}
	})
}

// A required sink that has failed takes the session with it, with a reason for its
// user; another does not.
func TestOnlyARequiredSinkFailsTheSession(t *testing.T) {
	reason := errors.New("the reason")
	for _, required := range []error{nil, reason} {
		var file written
		broken := newSink(failing{}, required, func(error) {})
		whole := newSink(&file, nil, neverFails(t))
		c := newCast(sessionrecording.CastHeader{}, broken, whole)
		_ = c.output(stdout, []byte("first"))
		<-broken.done
		if err := c.output(stdout, []byte("second")); !errors.Is(err, required) {
			t.Errorf("got error %v; want %v", err, required)
		}
		_ = whole.close()
		if required == nil && outputOf(t, file.String()) != "firstsecond" {
			t.Errorf("the other sink has %q", file.String())
		}
	}
}

type failing struct{}

// Write implements [io.Writer].
func (failing) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// BenchmarkOutput measures what it costs to record a frame of 32 KiB.
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

// What is no terminal has no size, whatever its client says.
func TestWithoutATerminalNoSizeIsRecorded(t *testing.T) {
	if err := (*terminal)(new(Session)).fromClient(resize, []byte(`{"Width":200,"Height":50}`)); err != nil {
		t.Error(err)
	}
	if err := (*terminal)(new(Session)).fromClient(resize, []byte("no size")); err != nil {
		t.Errorf("what is not looked at is an error: %v", err)
	}
	// Nor have the oldest protocols over SPDY, in which the API server reads none.
	for version, want := range map[string]bool{"channel.k8s.io": true, "v2.channel.k8s.io": true, "v3.channel.k8s.io": false, "v4.channel.k8s.io": false, "v5.channel.k8s.io": false} {
		s := &Session{kind: exec, upgrade: spdyUpgrade, tty: true}
		if _, err := s.protocol(http.Header{"Upgrade": {"SPDY/3.1"}, "X-Stream-Protocol-Version": {version}}); err != nil {
			t.Fatal(err)
		}
		if s.unsized != want {
			t.Errorf("%s: sizes are left out: %v; want %v", version, s.unsized, want)
		}
	}
	if err := (*terminal)(&Session{tty: true, unsized: true}).fromClient(resize, []byte(`{"Width":200,"Height":50}`)); err != nil {
		t.Error(err)
	}
}
