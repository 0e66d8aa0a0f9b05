// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	// tokenPeriod is how long a token is used before its file is read again. A
	// kubelet renews a service account's token when 80 % of its life is over,
	// which is at least two minutes before it ends.
	tokenPeriod = time.Minute
	// tokenRetry is how long after a failure a file is read again.
	tokenRetry = time.Second
)

// tokenFile is a bearer token in a file that somebody else renews.
type tokenFile struct {
	path   string
	logger *zap.Logger

	mu sync.Mutex
	// token is the last good token, empty if there has been none.
	token string
	// err is why the file could not be read the last time, nil if it could.
	err error
	// next is when to read the file again.
	next time.Time
	// written is when the last good token was written, as its file says.
	written time.Time
}

// get returns the token. If the file can no longer be read it returns the last
// good one together with the reason, stale. It is an error if there has never
// been one: an empty token is none.
func (f *tokenFile) get() (token string, stale, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now := time.Now(); now.After(f.next) {
		f.read(now)
	}
	if f.token == "" {
		return "", nil, f.err
	}
	return f.token, f.err, nil
}

// expire makes the next get read the file, unless it was just tried.
func (f *tokenFile) expire() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.next = time.Time{}
	}
}

// read reads the file. The caller holds f.mu.
func (f *tokenFile) read(now time.Time) {
	token, written, err := readToken(f.path)
	if err != nil {
		if f.err == nil {
			f.logger.Error("the bearer token cannot be renewed; the last good one, if any, stays in use", zap.Error(err))
		}
		f.err, f.next = err, now.Add(tokenRetry)
		return
	}
	if f.err != nil {
		f.logger.Info("the bearer token can be read again", zap.String("file", f.path))
	}
	f.token, f.written, f.err, f.next = token, written, nil, now.Add(tokenPeriod)
}

// readToken returns the token in the file at path and when it was written. It is an
// error if there is none.
func readToken(path string) (token string, written time.Time, err error) {
	// Before it is read: a token that is replaced meanwhile is not older than
	// that.
	info, err := os.Stat(path)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("token file: %w", err)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return "", time.Time{}, fmt.Errorf("token file: %w", err)
	}
	token = strings.TrimSpace(string(content))
	if token == "" {
		return "", time.Time{}, fmt.Errorf("token file %s: it is empty", path)
	}
	return token, info.ModTime(), nil
}
