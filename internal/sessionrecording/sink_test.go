// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/sessionrecording"
)

// A sink that cannot write buffers a bounded amount, and fails after a while.
func TestSink_StalledWriteFails(t *testing.T) {
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
			t.Errorf("the sink failed after %v; want %v", took, stall)
		}
		if wrote > 2*maxPending {
			t.Errorf("%d bytes are buffered; want at most %d", wrote, 2*maxPending)
		}
		if got := <-failed; !errors.Is(got, errStalled) {
			t.Errorf("the sink failed with %v", got)
		}
		if err := s.close(); !errors.Is(err, errStalled) {
			t.Errorf("close returns %v", err)
		}
		r.Close()
	})
}

// A slow sink slows its session down, and does not fail.
func TestSink_SlowWriteBlocks(t *testing.T) {
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

// Only the failure of a required sink ends the session.
func TestSink_OnlyRequiredOneFailsSession(t *testing.T) {
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
