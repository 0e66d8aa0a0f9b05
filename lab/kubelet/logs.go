// SPDX-License-Identifier: Apache-2.0

package kubelet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"sync"
)

// logFile is a log with one writer and any number of followers.
type logFile struct {
	path string

	mu      sync.Mutex
	file    *os.File
	size    int64
	ended   bool          // whether nothing more will be written
	changed chan struct{} // closed and replaced when size or ended changes
}

func newLogFile(path string) (*logFile, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	return &logFile{path: path, file: f, changed: make(chan struct{})}, nil
}

// Write implements [io.Writer].
func (l *logFile) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.file.Write(b)
	l.size += int64(n)
	l.notifyLocked()
	return n, err
}

// end marks the log as complete. If there is a reason, it is added to the log.
func (l *logFile) end(reason error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	if reason != nil {
		n, err := fmt.Fprintf(l.file, "kubelet: %v\n", reason)
		if err == nil {
			l.size += int64(n)
		}
	}
	l.ended = true
	l.notifyLocked()
}

// close ends the log and closes the file.
func (l *logFile) close() {
	l.end(nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.file.Close() // every write was checked
}

// notifyLocked wakes the followers. l.mu must be held.
func (l *logFile) notifyLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// state returns the size of the log, whether it has ended, and a channel that is
// closed when either changes.
func (l *logFile) state() (size int64, ended bool, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size, l.ended, l.changed
}

// copyTo copies the log from offset to w. If follow is set, it continues until the
// log or ctx ends, otherwise it stops at the current end.
func (l *logFile) copyTo(ctx context.Context, w io.Writer, offset int64, follow bool) error {
	f, err := os.Open(l.path)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		size, ended, changed := l.state()
		n, err := io.Copy(w, io.NewSectionReader(f, offset, size-offset))
		offset += n
		if err != nil {
			return err
		}
		if ended || !follow {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// tail returns the offset at which the last n lines of the log begin.
func (l *logFile) tail(n int64) (int64, error) {
	size, _, _ := l.state()
	if n == 0 {
		return size, nil
	}
	f, err := os.Open(l.path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	log, err := io.ReadAll(io.NewSectionReader(f, 0, size))
	if err != nil {
		return 0, err
	}
	// A newline at the end ends the last line and starts no new one.
	end := len(bytes.TrimSuffix(log, []byte("\n")))
	for ; n > 0; n-- {
		end = bytes.LastIndexByte(log[:max(end, 0)], '\n')
		if end < 0 {
			return 0, nil
		}
	}
	return int64(end) + 1, nil
}

// logOptions are the supported options of a request for logs.
type logOptions struct {
	follow bool
	tail   int64 // lines, or -1
	limit  int64 // bytes, or -1
}

// parseLogOptions reads the options from a query. Unknown options are errors, and so
// are unsupported ones, unless they have the value that changes nothing.
func parseLogOptions(query url.Values) (logOptions, error) {
	opts := logOptions{tail: -1, limit: -1}
	for name, values := range query {
		if len(values) != 1 {
			return opts, fmt.Errorf("%s is given %d times", name, len(values))
		}
		value, err := values[0], error(nil)
		switch name {
		case "follow":
			opts.follow, err = strconv.ParseBool(value)
		case "tailLines":
			opts.tail, err = parseCount(value)
		case "limitBytes":
			opts.limit, err = parseCount(value)
		case "previous", "timestamps", "stream", "sinceSeconds", "sinceTime":
			if !slices.Contains([]string{"", "false", "All"}, value) {
				err = errors.New("the lab's kubelet does not support it")
			}
		default:
			err = errors.New("unknown option")
		}
		if err != nil {
			return opts, fmt.Errorf("%s=%s: %w", name, value, err)
		}
	}
	return opts, nil
}

// parseCount parses a number that is not negative.
func parseCount(s string) (int64, error) {
	n, err := strconv.ParseUint(s, 10, 62)
	return int64(n), err
}

// serveLogs answers a request for the logs of a container.
func (s *Server) serveLogs(w http.ResponseWriter, r *http.Request) {
	opts, err := parseLogOptions(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	p, ok := s.requestedPod(w, r)
	if !ok {
		return
	}
	var offset int64
	if opts.tail >= 0 {
		if offset, err = p.logs.tail(opts.tail); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	ctx, cancel := s.streamContext(r.Context(), p)
	defer cancel()
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	out := &flushWriter{w: w, rc: http.NewResponseController(w), left: opts.limit}
	// Send the header even if the container is silent.
	if err := out.rc.Flush(); err != nil {
		return // the caller has disconnected
	}
	err = p.logs.copyTo(ctx, out, offset, opts.follow)
	if err != nil && !errors.Is(err, errLimit) && ctx.Err() == nil {
		s.http.ErrorLog.Printf("logs of pod %s: %v", p.name, err)
		panic(http.ErrAbortHandler) // a clean end would look like the complete log
	}
}

// errLimit is returned by a flushWriter when it reaches its limit.
var errLimit = errors.New("limit reached")

// flushWriter flushes after every write, up to a limit of bytes.
type flushWriter struct {
	w    io.Writer
	rc   *http.ResponseController
	left int64 // or negative for no limit
}

// Write implements [io.Writer].
func (f *flushWriter) Write(b []byte) (int, error) {
	limited := f.left >= 0 && int64(len(b)) >= f.left
	if limited {
		b = b[:f.left]
	}
	n, err := f.w.Write(b)
	if f.left >= 0 {
		f.left -= int64(n)
	}
	if err == nil {
		err = f.rc.Flush()
	}
	if err == nil && limited {
		err = errLimit
	}
	return n, err
}
