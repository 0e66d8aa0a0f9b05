// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/sessionrecording"
)

// Everything that is printed is recorded, with and without a terminal, in each protocol.
func TestTerminal_RecordsStdoutAndStderr(t *testing.T) {
	for _, tt := range []struct{ name, upgrade, version, client, stdout, stderr string }{
		{"SPDY", spdyUpgrade, "v4.channel.k8s.io", opening(t), spdyFrame(5, "out"), spdyFrame(7, "err")},
		{"WebSocket", websocketUpgrade, "v5.channel.k8s.io", "", wsServer("\x01out"), wsServer("\x02err")},
		{"WebSocket in base64", websocketUpgrade, base64Channels, "", ws(0x80|opText, false, "1b3V0"), ws(0x80|opText, false, "2ZXJy")},
	} {
		for _, tty := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/tty %t", tt.name, tty), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var got written
					s := newSink(&got, nil, neverFails(t))
					tm := newTerminal(tty, nil)
					tm.cast = newCast(sessionrecording.CastHeader{}, s)
					p, err := tm.protocol(tt.upgrade, tt.version)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := (&filter{next: p.fromClient}).push([]byte(tt.client)); err != nil {
						t.Fatal(err)
					}
					if _, err := (&filter{next: p.fromServer}).push([]byte(tt.stderr + tt.stdout)); err != nil {
						t.Fatal(err)
					}
					if err := errors.Join(tm.cast.finish(), s.close()); err != nil {
						t.Fatal(err)
					}
					if out := outputOf(t, got.String()); out != "errout" {
						t.Errorf("got %q; want errout", out)
					}
				})
			})
		}
	}
}

// Data from the API server on an input stream would not be recorded, and a client might
// print it.
func TestTerminal_RejectsOutputOnInputStream(t *testing.T) {
	for what, passes := range map[stream]bool{stdout: true, stderr: true, errs: true, stdin: false, resize: false} {
		tm := &terminal{cast: newCast(sessionrecording.CastHeader{})}
		if err := tm.fromServer(what, []byte("x")); (err == nil) != passes {
			t.Errorf("%s: got error %v; want one: %v", what, err, !passes)
		}
	}
}

func TestSizes_Add(t *testing.T) {
	for _, tt := range []struct {
		name   string
		pieces []string
		want   [][2]uint16
		fails  bool
	}{
		{"one", []string{`{"Width":1,"Height":2}`}, [][2]uint16{{1, 2}}, false},
		{"two at once", []string{`{"Width":1,"Height":2}` + "\n" + `{"Width":3,"Height":4}` + "\n"}, [][2]uint16{{1, 2}, {3, 4}}, false},
		{"in pieces", []string{`{"Wid`, `th":1,`, `"Height":2}{"W`, `idth":3,"Height":4}`}, [][2]uint16{{1, 2}, {3, 4}}, false},
		{"no terminal", []string{`{"Width":0,"Height":0}`, `{}`}, nil, false},
		{"not JSON", []string{`80x24`}, nil, true},
		{"too large a number", []string{`{"Width":70000,"Height":2}`}, nil, true},
		{"too long", []string{`{"Width":"` + strings.Repeat("1", maxSize+1)}, nil, true},
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

// Output waits for the first size, once, and for a limited time.
func TestSizes_Wait(t *testing.T) {
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

// Without a terminal there is no size, whatever the client sends.
func TestTerminal_IgnoresSizeWithoutTTY(t *testing.T) {
	if err := new(terminal).fromClient(resize, []byte(`{"Width":200,"Height":50}`)); err != nil {
		t.Error(err)
	}
	if err := new(terminal).fromClient(resize, []byte("no size")); err != nil {
		t.Errorf("an ignored size is an error: %v", err)
	}
	// The oldest protocols over SPDY have no sizes: the API server ignores them.
	for version, want := range map[string]bool{"channel.k8s.io": true, "v2.channel.k8s.io": true, "v3.channel.k8s.io": false, "v4.channel.k8s.io": false, "v5.channel.k8s.io": false} {
		tm := newTerminal(true, nil)
		if _, err := tm.protocol(spdyUpgrade, version); err != nil {
			t.Fatal(err)
		}
		if tm.unsized != want {
			t.Errorf("%s: sizes are ignored: %v; want %v", version, tm.unsized, want)
		}
	}
	if err := (&terminal{tty: true, unsized: true}).fromClient(resize, []byte(`{"Width":200,"Height":50}`)); err != nil {
		t.Error(err)
	}
}
