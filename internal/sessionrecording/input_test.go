// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"tailscale.com/sessionrecording"
)

// eventsOf returns the events of a recording, as their kinds and data.
func eventsOf(t *testing.T, recording string) (events [][2]string) {
	t.Helper()
	for line := range strings.Lines(recording) {
		if strings.HasPrefix(line, "{") {
			continue
		}
		var event []any
		if err := json.Unmarshal([]byte(line), &event); err != nil || len(event) != 3 {
			t.Fatalf("%v: %q", err, line)
		}
		events = append(events, [2]string{event[1].(string), event[2].(string)})
	}
	return events
}

// inputOf sends frames of a client through a terminal, and returns the events that are
// recorded.
func inputOf(t *testing.T, tm *terminal, upgrade, version string, frames ...string) [][2]string {
	t.Helper()
	var got written
	s := newSink(&got, nil, neverFails(t))
	tm.cast = newCast(sessionrecording.CastHeader{}, s)
	p, err := tm.protocol(upgrade, version)
	if err != nil {
		t.Fatal(err)
	}
	in := filter{next: p.fromClient}
	for _, frame := range frames {
		if pass, err := in.push([]byte(frame)); err != nil || string(pass) != frame {
			t.Fatalf("%.50q: passed %d of %d bytes, %v", frame, len(pass), len(frame), err)
		}
	}
	if err := errors.Join(tm.cast.finish(), s.close()); err != nil {
		t.Fatal(err)
	}
	return eventsOf(t, got.String())
}

// What is typed is recorded only if that is asked for.
func TestTerminal_RecordsInput(t *testing.T) {
	text := func(payload string) string { return ws(0x80|opText, true, payload) }
	size := `{"Width":120,"Height":40}`
	for _, tt := range []struct {
		name, upgrade, version string
		frames                 []string
	}{
		{"SPDY", spdyUpgrade, "v4.channel.k8s.io", []string{opening(t), spdyFrame(3, "gr\xc3"), spdyFrame(3, "\xbc\xc3\x9fe"), spdyFrame(3, "\r\xff\xc3")}},
		{"WebSocket", websocketUpgrade, "v5.channel.k8s.io", []string{wsClient("\x04" + size), wsClient("\x00gr\xc3"), wsClient("\x00\xbc\xc3\x9fe"), wsClient("\x00\r\xff\xc3"), wsClient("\xff\x00")}},
		{"WebSocket in base64", websocketUpgrade, base64Channels, []string{text("0" + base64.StdEncoding.EncodeToString([]byte("gr\xc3"))), text("0" + base64.StdEncoding.EncodeToString([]byte("\xbc\xc3\x9fe"))), text("0" + base64.StdEncoding.EncodeToString([]byte("\r\xff\xc3")))}},
	} {
		for _, tty := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/tty %t", tt.name, tty), func(t *testing.T) {
				tm := newTerminal(tty, nil)
				if got := inputOf(t, tm, tt.upgrade, tt.version, tt.frames...); len(got) != 0 {
					t.Errorf("without being asked for, recorded %q", got)
				}
				tm = newTerminal(tty, nil)
				tm.input = true
				want := [][2]string{{"i", "gr"}, {"i", "üße"}, {"i", "\r\ufffd"}, {"i", "\ufffd"}}
				if diff := cmp.Diff(want, inputOf(t, tm, tt.upgrade, tt.version, tt.frames...)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

// Without a terminal, programs write any amount.
func TestTerminal_BoundsInputWithoutTTY(t *testing.T) {
	half := wsClient("\x00" + strings.Repeat("x", maxInput/2))
	for _, tty := range []bool{false, true} {
		tm := newTerminal(tty, nil)
		tm.input = true
		got := inputOf(t, tm, websocketUpgrade, "v5.channel.k8s.io", half, half, wsClient("\x00y"), half, half)
		bytes, marks := 0, 0
		for _, event := range got {
			switch event[0] {
			case "i":
				bytes += len(event[1])
			case "m":
				marks++
				if event[1] != "the input is not recorded after 1048576 bytes" {
					t.Errorf("got the mark %q", event[1])
				}
			}
		}
		if tty && (bytes != 2*maxInput+1 || marks != 0) || !tty && (bytes != maxInput || marks != 1) {
			t.Errorf("tty %t: recorded %d bytes and %d marks", tty, bytes, marks)
		}
	}
}

// A recording that is required ends its session when it fails, also while it is typed.
func TestTerminal_InputEndsWhenRecordingFails(t *testing.T) {
	fails := newSink(failing{}, errFileLost, func(error) {})
	if err := fails.write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	<-fails.dead
	tm := newTerminal(true, nil)
	tm.input, tm.cast = true, newCast(sessionrecording.CastHeader{}, fails)
	if err := tm.fromClient(stdin, []byte("ls")); !errors.Is(err, errFileLost) {
		t.Errorf("got error %v; want %v", err, errFileLost)
	}
}

func TestBegin_InputOnlyIfAskedFor(t *testing.T) {
	for _, asked := range []bool{false, true} {
		rec := newRecorder(t.TempDir())
		rec.Input = asked
		s := begin(t, rec, execRequest(t))
		defer s.Close()
		if s.terminal.input != asked {
			t.Errorf("asked for %t: got %t", asked, s.terminal.input)
		}
	}
}
