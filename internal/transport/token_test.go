// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/proxytest"
)

// After a 401, the next request reads the token's file, in case the old token was
// revoked as soon as it was replaced.
func TestToken_ReadAgainAfter401(t *testing.T) {
	path := writeFile(t, "token", "old")
	s, tr, _ := withTokenFile(t, path)
	checkToken(t, s, tr, "Bearer old")
	rewrite(t, path, "new")
	checkToken(t, s, tr, "Bearer old") // not due yet
	s.Answer(http.StatusUnauthorized)
	roundTrip(t, tr, newRequest(s, "/api"))
	s.Take()
	s.Answer(0)
	checkToken(t, s, tr, "Bearer new")
}

// withTokenFile returns an API server and a transport to it whose token is in the
// file at path, with what the token file logs.
func withTokenFile(t *testing.T, path string) (*proxytest.APIServer, *Transport, *observer.ObservedLogs) {
	t.Helper()
	s := proxytest.NewAPIServer(t)
	tr := newTransport(t, trusting(s, map[string]any{"tokenFile": path}))
	core, logs := observer.New(zapcore.InfoLevel)
	tr.cluster.token.logger = zap.New(core)
	return s, tr, logs
}

// expire makes the next request read the token's file.
func expire(tr *Transport) {
	tr.cluster.token.mu.Lock()
	defer tr.cluster.token.mu.Unlock()
	tr.cluster.token.next = time.Time{}
}

func rewrite(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// checkToken checks the Authorization header of the next request.
func checkToken(t *testing.T, s *proxytest.APIServer, tr *Transport, want string) {
	t.Helper()
	if resp := roundTrip(t, tr, newRequest(s, "/api")); resp.StatusCode != http.StatusOK {
		t.Errorf("answered %s", resp.Status)
	}
	if got := s.One(t).Header["Authorization"]; len(got) != 1 || got[0] != want {
		t.Errorf("got Authorization %q; want %q", got, want)
	}
}

// A renewed token is used without a restart.
func TestToken_Rotation(t *testing.T) {
	path := writeFile(t, "token", "first\n")
	s, tr, _ := withTokenFile(t, path)
	checkToken(t, s, tr, "Bearer first")
	rewrite(t, path, "second")
	expire(tr)
	checkToken(t, s, tr, "Bearer second")
}

// Without a token, no request is sent, neither without Authorization nor with an empty
// one.
func TestToken_MissingRefusesRequests(t *testing.T) {
	for name, content := range map[string]string{"empty": "", "blank": " \n\t\n"} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "token", content)
			s, tr, logs := withTokenFile(t, path)
			refusals := logOf(tr)
			for range 3 {
				proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api")), proxytest.Unavailable, "no credentials")
				checkCause(t, refusals, path, "empty")
				proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api", "Connection", "Upgrade", "Upgrade", "websocket")), proxytest.Unavailable)
				s.CheckNone(t)
				expire(tr)
			}
			if n := logs.FilterLevelExact(zapcore.ErrorLevel).Len(); n != 1 {
				t.Errorf("logged %d times; want once", n)
			}
		})
	}
	t.Run("missing, and written later", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "token")
		s, tr, logs := withTokenFile(t, path)
		refusals := logOf(tr)
		proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api")), proxytest.Unavailable)
		checkCause(t, refusals, path)
		s.CheckNone(t)
		rewrite(t, path, "late")
		expire(tr)
		checkToken(t, s, tr, "Bearer late")
		if n := logs.FilterLevelExact(zapcore.InfoLevel).Len(); n != 1 {
			t.Errorf("logged %d times that the token can be read; want once", n)
		}
	})
}

// A token whose file is gone stays in use, and is logged once, until the API server no
// longer accepts it. The refusal then blames the proxy's credentials, not the caller's.
func TestToken_StaleStaysInUse(t *testing.T) {
	for name, spoil := range map[string]func(*testing.T, string){
		"gone": func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		},
		"empty": func(t *testing.T, path string) { rewrite(t, path, "") },
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFile(t, "token", "good")
			s, tr, logs := withTokenFile(t, path)
			checkToken(t, s, tr, "Bearer good")
			spoil(t, path)
			for range 3 {
				expire(tr)
				checkToken(t, s, tr, "Bearer good")
			}
			if n := logs.FilterLevelExact(zapcore.ErrorLevel).Len(); n != 1 {
				t.Errorf("logged %d times; want once", n)
			}

			s.Answer(http.StatusUnauthorized)
			refusals := logOf(tr)
			proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api")), proxytest.Unavailable, "no longer accepts")
			checkCause(t, refusals, path)
			s.Answer(http.StatusForbidden)
			if resp := roundTrip(t, tr, newRequest(s, "/api")); resp.StatusCode != http.StatusForbidden {
				t.Errorf("a 403 was answered with %s", resp.Status)
			}
			s.Answer(0)
			s.Take()

			rewrite(t, path, "renewed")
			expire(tr)
			checkToken(t, s, tr, "Bearer renewed")
			s.Answer(http.StatusUnauthorized)
			if resp := roundTrip(t, tr, newRequest(s, "/api")); resp.StatusCode != http.StatusUnauthorized {
				t.Errorf("with a fresh token, a 401 was answered with %s", resp.Status)
			}
		})
	}
}

// A response that is not passed on is closed, so that its connection can be used again.
func TestToken_DiscardedResponseIsClosed(t *testing.T) {
	path := writeFile(t, "token", "good")
	s, tr, _ := withTokenFile(t, path)
	checkToken(t, s, tr, "Bearer good")
	rewrite(t, path, "")
	expire(tr)
	body := &closeRecorder{Reader: strings.NewReader("Unauthorized")}
	tr.cluster.http2 = roundTripFunc(func(*http.Request) (*http.Response, error) {
		return &http.Response{StatusCode: http.StatusUnauthorized, Body: body}, nil
	})
	proxytest.CheckRefused(t, roundTrip(t, tr, newRequest(s, "/api")), proxytest.Unavailable)
	if !body.closed {
		t.Error("the API server's response is left open")
	}
}

func TestToken_ConcurrentUse(t *testing.T) {
	f := &tokenFile{path: writeFile(t, "token", "good"), logger: zap.NewNop()}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if token, _, err := f.get(); token != "good" || err != nil {
				t.Errorf("got %q, %v; want good", token, err)
			}
		})
	}
	wg.Wait()
}

// A token's file is read again well before the token expires, given how early a kubelet
// renews it, and sooner after a failure.
func TestToken_ReadInterval(t *testing.T) {
	path := writeFile(t, "token", "first")
	synctest.Test(t, func(t *testing.T) {
		f := &tokenFile{path: path, logger: zap.NewNop()}
		check := func(want string, stale bool) {
			t.Helper()
			token, reason, err := f.get()
			if err != nil || token != want || (reason != nil) != stale {
				t.Errorf("after %v: got %q, %v, %v; want %q, stale: %v", time.Now(), token, reason, err, want, stale)
			}
		}
		check("first", false)
		rewrite(t, path, "second")
		time.Sleep(tokenPeriod)
		check("first", false)
		time.Sleep(time.Nanosecond)
		check("second", false)

		rewrite(t, path, "")
		time.Sleep(tokenPeriod + 1)
		check("second", true)
		rewrite(t, path, "third")
		check("second", true)
		time.Sleep(tokenRetry + 1)
		check("third", false)
	})
	if tokenPeriod > 2*time.Minute {
		t.Errorf("tokenPeriod is %v, longer than a token is sure to be valid after a kubelet has renewed it", tokenPeriod)
	}
}
