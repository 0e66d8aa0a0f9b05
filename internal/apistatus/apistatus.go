// SPDX-License-Identifier: Apache-2.0

// Package apistatus answers requests that are not forwarded to the API server.
//
// A refusal is a Kubernetes Status object, because kubectl and client-go print the
// message of one; they report anything else as "an error on the server has prevented
// the request from succeeding". A Warning header repeats the message.
//
// client-go's discovery requests are the exception: they do not read the Status, and
// kubectl reports "Forbidden: unknown". The message of a 403 reaches the user only as
// text. Other messages reach the user as a warning.
package apistatus

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"path"
	"strconv"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
)

// Prefix starts every message, so that the reader can tell a refusal by the proxy
// from one by the API server.
const Prefix = "tailscale_impersonate: "

// Forbidden returns a 403: this caller may not do this.
func Forbidden(because Reason, format string, args ...any) error {
	return refuse(because, kind{http.StatusForbidden, metav1.StatusReasonForbidden}, format, args...)
}

// BadRequest returns a 400: no caller may do this.
func BadRequest(because Reason, format string, args ...any) error {
	return refuse(because, kind{http.StatusBadRequest, metav1.StatusReasonBadRequest}, format, args...)
}

// NotFound returns a 404: there is no such thing, or not for this caller.
func NotFound(because Reason, format string, args ...any) error {
	return refuse(because, kind{http.StatusNotFound, metav1.StatusReasonNotFound}, format, args...)
}

// MethodNotAllowed returns a 405.
func MethodNotAllowed(because Reason, format string, args ...any) error {
	return refuse(because, kind{http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed}, format, args...)
}

// Misdirected returns a 421, which makes a client retry over another connection.
func Misdirected(because Reason, format string, args ...any) error {
	return refuse(because, kind{http.StatusMisdirectedRequest, "MisdirectedRequest"}, format, args...)
}

// Unavailable returns a 503: the proxy cannot do its part until an operator acts.
func Unavailable(because Reason, format string, args ...any) error {
	return refuse(because, kind{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable}, format, args...)
}

// TryAgain returns a 503 that asks for a retry after one second. client-go retries
// ten times before it reports the message.
func TryAgain(because Reason, format string, args ...any) error {
	err := refuse(because, kind{http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable}, format, args...)
	err.ErrStatus.Details.RetryAfterSeconds = 1
	return err
}

// TooManyRequests returns a 429 that asks for a retry after one second, as [TryAgain]
// does.
func TooManyRequests(because Reason, format string, args ...any) error {
	err := refuse(because, kind{http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests}, format, args...)
	err.ErrStatus.Details.RetryAfterSeconds = 1
	return err
}

// HeaderFieldsTooLarge returns a 431.
func HeaderFieldsTooLarge(because Reason, format string, args ...any) error {
	return refuse(because, kind{http.StatusRequestHeaderFieldsTooLarge, "RequestHeaderFieldsTooLarge"}, format, args...)
}

// kind is the kind of a Status object.
type kind struct {
	code   int32
	reason metav1.StatusReason
}

func refuse(because Reason, kind kind, format string, args ...any) *apierrors.StatusError {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure,
		Code:     kind.code,
		Reason:   kind.reason,
		Message:  Prefix + fmt.Sprintf(format, args...),
		Details:  &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: metav1.CauseType(because)}}},
	}}
}

// discovers reports whether r is a discovery request of client-go, or another one for the
// same that also accepts text. The path may be below that of a cluster.
func discovers(r *http.Request) bool {
	switch path.Base(r.URL.Path) {
	case "api", "apis", "version":
	default:
		return false
	}
	accept := strings.Join(r.Header["Accept"], ",")
	return r.Method == http.MethodGet && (strings.Contains(accept, "g=apidiscovery.k8s.io;") || strings.Contains(accept, "*/*"))
}

// answer is the answer to a refused request.
type answer struct {
	code   int
	header http.Header
	body   []byte
}

// answerTo counts err, and returns the answer to r: the Status object of err or its
// message. Any other error becomes a 500 that does not contain its text, which is for the
// log only.
func answerTo(r *http.Request, err error) (*answer, error) {
	refusals.With(ReasonOf(err)).Inc()
	status, ok := From(err)
	if !ok {
		status = &refuse(Other, kind{http.StatusInternalServerError, metav1.StatusReasonInternalError}, "the proxy failed; its log says why").ErrStatus
	}
	a := &answer{code: int(status.Code), header: make(http.Header)}
	if a.code == http.StatusForbidden && discovers(r) {
		a.body = []byte(status.Message)
		a.header.Set("Content-Type", "text/plain; charset=utf-8")
		a.header.Set("X-Content-Type-Options", "nosniff")
	} else {
		if a.body, err = json.Marshal(status); err != nil {
			return nil, fmt.Errorf("encoding a refusal: %w", err)
		}
		a.header.Set("Content-Type", "application/json")
	}
	a.header.Set("Content-Length", strconv.Itoa(len(a.body)))
	a.header.Set("Cache-Control", "no-cache, private")
	// The API server's own warnings have code 299. A message that is not valid in a
	// header is only in the body.
	if warning, err := utilnet.NewWarningHeader(299, "-", status.Message); err == nil {
		a.header.Set("Warning", warning)
	}
	if d := status.Details; d != nil && d.RetryAfterSeconds > 0 {
		a.header.Set("Retry-After", strconv.Itoa(int(d.RetryAfterSeconds)))
	}
	return a, nil
}

// Write answers r with the Status object of err, or a 500 if it has none.
func Write(w http.ResponseWriter, r *http.Request, err error) error {
	a, err := answerTo(r, err)
	if err != nil {
		return err
	}
	maps.Copy(w.Header(), a.header)
	w.WriteHeader(a.code)
	// An error means that the client is gone. Caddy would log it with the whole request.
	_, _ = w.Write(a.body)
	return nil
}

// Response returns the response of an [http.RoundTripper] to r: the Status object of err,
// or a 500 if it has none.
func Response(r *http.Request, err error) (*http.Response, error) {
	if r.Body != nil {
		_ = r.Body.Close() // as http.RoundTripper requires
	}
	a, err := answerTo(r, err)
	if err != nil {
		return nil, err
	}
	return &http.Response{
		Status:        strconv.Itoa(a.code) + " " + http.StatusText(a.code),
		StatusCode:    a.code,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        a.header,
		Body:          io.NopCloser(bytes.NewReader(a.body)),
		ContentLength: int64(len(a.body)),
		Request:       r,
	}, nil
}
