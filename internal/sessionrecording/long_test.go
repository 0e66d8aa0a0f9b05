// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"tailscale.com/sessionrecording"
)

// What a caller who may be refused writes into a header is bounded.
func TestBegin_CutsValuesOfClient(t *testing.T) {
	for _, filler := range []string{"<", "\x01", "\xff", "日"} {
		long := strings.Repeat(filler, 100_000)
		r := execRequest(t)
		r.URL.Path = "/api/v1/namespaces/" + long + "/pods/" + long + "/exec"
		r.URL.RawQuery = url.Values{"command": {long}, "container": {long}}.Encode()
		s := begin(t, newRecorder(t.TempDir()), r)
		defer s.Close()
		k := s.header.Kubernetes
		for what, value := range map[string]string{"command": s.header.Command, "container": k.Container, "pod": k.PodName, "namespace": k.Namespace} {
			if !strings.HasPrefix(value, filler) || !strings.HasSuffix(value, fmt.Sprintf("[cut, %d bytes]", len(long))) {
				t.Errorf("the %s is %.300q; want it cut off", what, value)
			}
		}
		var got written
		sink := newSink(&got, nil, neverFails(t))
		c := newCast(s.header, sink)
		if err := c.open(); err != nil {
			t.Fatal(err)
		}
		if err := sink.close(); err != nil {
			t.Fatal(err)
		}
		if n := len(got.String()); n > 2<<10 {
			t.Errorf("the header has %d bytes; want at most 2048", n)
		}
	}
}

// Whoever may run a command cannot hide it from its recording behind a long start.
func TestCast_HasWholeCommand(t *testing.T) {
	command := strings.Repeat("日x", 30_000) + "\xff" + strings.Repeat("\x01", 10_000) + "\xe6"
	var got written
	s := newSink(&got, nil, neverFails(t))
	c := newCast(sessionrecording.CastHeader{Command: "start"}, s)
	c.command = command
	if err := c.output(stdout, []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(got.String()), "\n")
	var whole strings.Builder
	for _, line := range lines[1 : len(lines)-1] {
		var event []any
		if err := json.Unmarshal([]byte(line), &event); err != nil || len(line) > 7*chunk {
			t.Fatalf("%d bytes: %v", len(line), err)
		}
		mark, piece, _ := strings.Cut(event[2].(string), ": ")
		if event[1] != "m" || !strings.HasPrefix(mark, "the command from byte ") {
			t.Errorf("got the event %.100s", line)
		}
		whole.WriteString(piece)
	}
	if want := strings.ToValidUTF8(command, "\ufffd"); whole.String() != want {
		t.Errorf("got a command of %d bytes; want %d", whole.Len(), len(want))
	}
}
