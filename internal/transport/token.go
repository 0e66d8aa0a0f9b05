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
	// kubelet renews a service account's token after 80 % of its lifetime, at least
	// two minutes before it expires.
	tokenPeriod = time.Minute
	// tokenRetry is how long after a failure a file is read again.
	tokenRetry = time.Second
)

// tokenFile is a bearer token in a file that another program renews.
type tokenFile struct {
	path   string
	logger *zap.Logger

	mu sync.Mutex
	// token is the last good token, empty if there has been none.
	token string
	// err is the result of the last attempt to read the file.
	err error
	// next is when to read the file again.
	next time.Time
	// written is the modification time of the file with the last good token.
	written time.Time
}

// get returns the token. If the file can no longer be read, it returns the last good
// token, and stale is the reason. It returns an error if there has been no good token;
// an empty one is not good.
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

// expire makes the next get read the file, unless the last attempt failed: get then
// tries again after tokenRetry anyway.
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

// readToken returns the token in the file at path, and the time it was written. An empty
// file is an error.
func readToken(path string) (token string, written time.Time, err error) {
	// First, so that the token that is read is at least this new.
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
