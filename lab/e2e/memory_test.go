// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recordertest"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/hostile"
)

// heap returns the size of the heap of this process, in which Caddy runs, without garbage.
func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// grown returns by how many MiB the heap has grown since it was before, once it grows no
// more.
func grown(t *testing.T, before int64) int64 {
	t.Helper()
	now := heap()
	for still := 0; still < 5; {
		time.Sleep(200 * time.Millisecond) // between two looks
		was := now
		if now = heap(); now < was+1<<20 {
			still++
		} else {
			still = 0
		}
	}
	return (now - before) >> 20
}

// Without the bound of what the connection to the API server buffers, it was 500 MiB.
func TestLong_UnreadAnswersAreBounded(t *testing.T) {
	if !*long {
		t.Skip("measures the heap: run with -long")
	}
	const requests, limit = 240, 150
	before := heap()
	conn, err := hostile.UnreadAnswers(t.Context(), theLab.Callers["dave"], "/openapi/v2", requests)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, "all requests are answered", func() error {
		if n := conn.Answers(); n < requests {
			return fmt.Errorf("%d of them", n)
		}
		return nil
	})
	if n := grown(t, before); n > limit {
		t.Errorf("%d answers that are not read hold %d MiB; want at most %d", requests, n, limit)
	} else {
		t.Logf("%d MiB", n)
	}
}

// Without the count of header fields, it was 500 MiB. None of the requests is answered.
func TestLong_HeaderFieldsAreBounded(t *testing.T) {
	if !*long {
		t.Skip("measures the heap: run with -long")
	}
	const limit = 50
	before := heap()
	conn, err := hostile.HeaderBombs(t.Context(), theLab.Callers["dave"], "/api", 200)
	if conn == nil {
		t.Fatal(err)
	}
	defer conn.Close()
	select {
	case <-conn.Over():
	case <-time.After(30 * time.Second):
		t.Error("the connection was not closed")
	}
	if n := grown(t, before); n > limit {
		t.Errorf("they hold %d MiB; want at most %d", n, limit)
	} else {
		t.Logf("%d MiB", n)
	}
}

// Without the limit of 1 MiB, it was 360 MiB.
func TestLong_FramesAreBounded(t *testing.T) {
	if !*long {
		t.Skip("measures the heap: run with -long")
	}
	const sessions, limit = 20, 100
	useRecorder(t, recordertest.V2)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	before := heap()
	for _, size := range []int{16<<20 - 1, 1 << 20} {
		for range sessions {
			conn, err := hostile.Upgraded(ctx, theLab.Callers["gus"], "/api/v1/namespaces/default/pods/"+lab.Pod+"/exec?command=cat&stdin=true&stdout=true")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if err := hostile.Frame(conn, size); err == nil && size > 1<<20 {
				// It ends while the rest is still on its way.
				wantClosed(t, conn)
			}
		}
	}
	if n := grown(t, before); n > limit {
		t.Errorf("%d sessions with frames that are not finished hold %d MiB; want at most %d", sessions, n, limit)
	} else {
		t.Logf("%d MiB", n)
	}
}

// wantClosed fails the test unless the proxy closes conn.
func wantClosed(t *testing.T, conn net.Conn) {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	var err error
	for b := make([]byte, 1<<10); err == nil; {
		_, err = conn.Read(b)
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("the session was not ended")
	}
}
