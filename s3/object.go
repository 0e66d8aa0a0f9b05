// SPDX-License-Identifier: Apache-2.0

package s3

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	"github.com/minio/minio-go/v7"
)

const (
	// stallTimeout is how long a read waits for the storage.
	stallTimeout = 20 * time.Second
	// maxBreaks is how often in a row a connection may break before any byte comes.
	maxBreaks = 4
)

// object reads an object. Whoever plays a recording reads it for as long as it lasts, with
// pauses, and a storage closes a connection on which nobody reads. Reading goes on over a
// new one then, at the same byte of the same object.
type object struct {
	ctx     context.Context
	storage *Storage
	name    string

	size, at int64
	etag     string // of the first answer
	breaks   int    // in a row
	body     io.ReadCloser
	cancel   context.CancelFunc // ends body
}

// open opens the object at o.at.
func (o *object) open() (minio.ObjectInfo, error) {
	var options minio.GetObjectOptions
	if o.etag != "" {
		if err := options.SetMatchETag(o.etag); err != nil {
			return minio.ObjectInfo{}, err
		}
	}
	if o.at > 0 {
		if err := options.SetRange(o.at, 0); err != nil {
			return minio.ObjectInfo{}, err
		}
	}
	ctx, cancel := context.WithCancel(o.ctx)
	core := minio.Core{Client: o.storage.client}
	body, info, _, err := core.GetObject(ctx, o.storage.Bucket, o.name, options)
	if err != nil {
		cancel()
		return minio.ObjectInfo{}, err
	}
	o.body, o.cancel, o.etag = body, cancel, info.ETag
	return info, nil
}

// Read implements [io.Reader].
func (o *object) Read(p []byte) (int, error) {
	for {
		n, err := o.read(p)
		o.at += int64(n)
		switch {
		case n > 0 || len(p) == 0:
			o.breaks = 0
			return n, nil // a break is noticed by the next read
		case err == nil:
			continue
		case errors.Is(err, io.EOF) && o.at >= o.size:
			return 0, io.EOF
		case o.ctx.Err() != nil:
			return 0, context.Cause(o.ctx)
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		o.drop()
		err = o.storage.explain(err)
		// What was replaced or deleted does not come back.
		code := minio.ToErrorResponse(errors.Unwrap(err)).StatusCode
		if o.breaks++; o.breaks > maxBreaks || code == http.StatusPreconditionFailed || code == http.StatusNotFound {
			return 0, err
		}
		timer := time.NewTimer(100 * time.Millisecond << o.breaks)
		select {
		case <-timer.C:
		case <-o.ctx.Done():
			timer.Stop()
		}
	}
}

// read reads from the connection, or from a new one.
func (o *object) read(p []byte) (int, error) {
	if o.body == nil {
		if o.at >= o.size {
			return 0, io.EOF // there is no such range
		}
		if _, err := o.open(); err != nil {
			return 0, err
		}
	}
	timer := time.AfterFunc(stallTimeout, o.cancel)
	defer timer.Stop()
	return o.body.Read(p)
}

// drop gives up the connection.
func (o *object) drop() {
	if o.body != nil {
		_ = o.body.Close() // nothing more is read
		o.cancel()
		o.body = nil
	}
}

// Close implements [io.Closer].
func (o *object) Close() error {
	o.drop()
	return nil
}
