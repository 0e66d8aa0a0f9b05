// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
)

// largeFrame is a WebSocket frame of a client, of 512 KiB.
var largeFrame = "\x82\xff\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00" + strings.Repeat("\x00", 512<<10)

func TestFilter_CountsWhatItHolds(t *testing.T) {
	s := begin(t, newRecorder(t.TempDir()), execRequest(t))
	defer s.Close()
	p, err := s.protocol(upgraded)
	if err != nil {
		t.Fatal(err)
	}
	var held int64
	f := filter{next: p.fromClient, grow: func(n int64) error {
		held += n
		return nil
	}}
	push := func(sent string, least, most int64) {
		t.Helper()
		if _, err := f.push([]byte(sent)); err != nil {
			t.Fatal(err)
		}
		if held < least || held > most {
			t.Errorf("%d bytes count as held after %d more; want %d to %d", held, len(sent), least, most)
		}
	}
	small := largeFrame[:1] + "\x81\x00\x00\x00\x00\x00"
	push(small, 0, 0)
	push(largeFrame[:30<<10], 0, 0)
	push(largeFrame[30<<10:len(largeFrame)-1], 400<<10, 1<<20)
	push(largeFrame[len(largeFrame)-1:], 0, 1<<20)
	// The next frames take turns with what was held for the large one.
	push(small, 0, 1<<20)
	push(small, 0, 0)
}

// Many sessions that hold the start of a large frame are more than a caller may hold.
func TestSession_EndsWhenItsFramesHoldTooMuch(t *testing.T) {
	const room = 300 << 10
	for _, target := range []string{
		"/api/v1/namespaces/default/pods/web/exec?command=sh",
		"/api/v1/namespaces/default/pods/web/portforward?ports=80",
	} {
		r := execRequest(t)
		r.URL.Path, r.URL.RawQuery, _ = strings.Cut(target, "?")
		r.Header.Set("Sec-Websocket-Protocol", "v4.channel.k8s.io")
		rec := newRecorder(t.TempDir())
		var held int64
		rec.Hold = func(ctx context.Context, n int64) bool {
			if ctx != r.Context() {
				t.Error("what is held counts for another request")
			}
			if held+n > room {
				return false
			}
			held += n
			return true
		}
		s := begin(t, rec, r)
		s.Watch(r.Context())
		p, err := s.protocol(http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {"v4.channel.k8s.io"}})
		if err != nil {
			t.Fatal(err)
		}
		f := filter{next: p.fromClient, grow: s.holding.grow}
		if _, err := f.push([]byte(largeFrame[:200<<10])); err != nil || held == 0 {
			t.Errorf("%s: got %v, and %d bytes count; want what fits", target, err, held)
		}
		if _, err := f.push([]byte(largeFrame[200<<10 : 500<<10])); !errors.Is(err, errHeld) {
			t.Errorf("%s: got %v; want %v", target, err, errHeld)
		}
		s.Close()
		if held != 0 {
			t.Errorf("%s: %d bytes count after the end", target, held)
		}
	}
}

// The frames of a port-forward over a WebSocket are inside of other frames.
func TestSession_CountsFramesInsideOfFrames(t *testing.T) {
	r := execRequest(t)
	r.URL.Path, r.URL.RawQuery = "/api/v1/namespaces/default/pods/web/portforward", ""
	r.Header.Set("Sec-Websocket-Protocol", "SPDY/3.1+portforward.k8s.io")
	rec := newRecorder(t.TempDir())
	rec.Hold = func(_ context.Context, n int64) bool { return n <= 0 }
	s := begin(t, rec, r)
	defer s.Close()
	s.Watch(r.Context())
	p, err := s.protocol(http.Header{"Upgrade": {"websocket"}, "Sec-Websocket-Protocol": {"SPDY/3.1+portforward.k8s.io"}})
	if err != nil {
		t.Fatal(err)
	}
	outer := filter{next: p.fromClient}
	// A data frame of SPDY of 512 KiB, in WebSocket frames of 32 KiB.
	frame := "\x00\x00\x00\x01\x00\x08\x00\x00" + strings.Repeat("x", 500<<10)
	for len(frame) > 0 {
		n := min(len(frame), 32<<10)
		_, err = outer.push([]byte("\x82\xfe" + string([]byte{byte(n >> 8), byte(n)}) + "\x00\x00\x00\x00" + frame[:n]))
		if err != nil {
			break
		}
		frame = frame[n:]
	}
	if !errors.Is(err, errHeld) {
		t.Errorf("got %v; want %v", err, errHeld)
	}
}
