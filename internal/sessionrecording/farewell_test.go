// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import "testing"

// The farewell has the form that kubectl expects.
func TestFarewell_ReachesTerminalAndErrorStream(t *testing.T) {
	const reason = "the recorder was lost"
	for _, c := range conversations(t) {
		t.Run(c.name, func(t *testing.T) {
			p := c.protocol(newNoted())
			if _, err := (&filter{next: p.fromClient}).push([]byte(c.client)); err != nil {
				t.Fatal(err)
			}
			got := newNoted()
			reader := c.protocol(got)
			if _, err := (&filter{next: reader.fromClient}).push([]byte(c.client)); err != nil {
				t.Fatal(err)
			}
			f := filter{next: reader.fromServer}
			farewell := p.farewell(reason)
			if pass, err := f.push(farewell); err != nil || len(pass) != len(farewell) {
				t.Fatalf("%d of %d bytes are frames: %v", len(pass), len(farewell), err)
			}
			terminal := got.server[stdout] + got.server[stderr]
			if want := "\r\n" + reason + "\r\n"; terminal != want {
				t.Errorf("on the terminal: %q; want %q", terminal, want)
			}
			want := `{"metadata":{},"status":"Failure","message":"the recorder was lost","reason":"Forbidden"}`
			if got.server[errs] != want {
				t.Errorf("on the error stream: %s; want %s", got.server[errs], want)
			}
		})
	}
}

// Within a fragmented message, only the rest of it may follow.
func TestFarewell_NoneWithinMessage(t *testing.T) {
	p := binaryChannels(newNoted())
	if _, err := (&filter{next: p.fromServer}).push([]byte(ws(opBinary, false, "\x01x"))); err != nil {
		t.Fatal(err)
	}
	if got := p.farewell("x"); len(got) > 0 {
		t.Errorf("got %q; want nothing", got)
	}
}
