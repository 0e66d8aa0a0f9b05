// SPDX-License-Identifier: Apache-2.0

// Package refusal answers requests that do not reach the API server.
//
// A refusal is a Kubernetes Status object, because that is what kubectl and
// client-go print the reason from; anything else they report as "an error on the
// server has prevented the request from succeeding". It comes with a Warning
// header that says the same: the requests with which kubectl finds out what the
// API server can do discard the Status, but not the warning.
package refusal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
)

// Prefix starts every message. It tells the reader that it is the proxy that
// refuses, not the API server.
const Prefix = "tailscale_impersonate: "

// Forbidden returns a 403: the caller, as far as it is known, may not do this.
func Forbidden(format string, args ...any) *apierrors.StatusError {
	return status(http.StatusForbidden, metav1.StatusReasonForbidden, format, args...)
}

// BadRequest returns a 400: nobody may do this.
func BadRequest(format string, args ...any) *apierrors.StatusError {
	return status(http.StatusBadRequest, metav1.StatusReasonBadRequest, format, args...)
}

// MethodNotAllowed returns a 405.
func MethodNotAllowed(format string, args ...any) *apierrors.StatusError {
	return status(http.StatusMethodNotAllowed, metav1.StatusReasonMethodNotAllowed, format, args...)
}

// Misdirected returns a 421, upon which a client tries again over another
// connection.
func Misdirected(format string, args ...any) *apierrors.StatusError {
	return status(http.StatusMisdirectedRequest, "MisdirectedRequest", format, args...)
}

// Unavailable returns a 503: the proxy cannot do its part, and somebody has to
// see to it first.
func Unavailable(format string, args ...any) *apierrors.StatusError {
	return status(http.StatusServiceUnavailable, metav1.StatusReasonServiceUnavailable, format, args...)
}

// TryAgain returns a 503 that asks for another try after one second. client-go
// makes ten without a word before it reports the message.
func TryAgain(format string, args ...any) *apierrors.StatusError {
	err := Unavailable(format, args...)
	err.ErrStatus.Details = &metav1.StatusDetails{RetryAfterSeconds: 1}
	return err
}

func status(code int32, reason metav1.StatusReason, format string, args ...any) *apierrors.StatusError {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure,
		Code:     code,
		Reason:   reason,
		Message:  Prefix + fmt.Sprintf(format, args...),
	}}
}

// Write answers a request with err.
func Write(w http.ResponseWriter, err *apierrors.StatusError) error {
	count(err)
	body, jsonErr := json.Marshal(err.ErrStatus)
	if jsonErr != nil {
		return fmt.Errorf("encoding a refusal: %w", jsonErr)
	}
	setHeaders(w.Header(), err, len(body))
	w.WriteHeader(int(err.ErrStatus.Code))
	_, writeErr := w.Write(body)
	return writeErr
}

// Response returns err as the answer to r, for an [http.RoundTripper].
func Response(r *http.Request, err *apierrors.StatusError) (*http.Response, error) {
	count(err)
	if r.Body != nil {
		// What a RoundTripper owes its caller.
		_ = r.Body.Close()
	}
	body, jsonErr := json.Marshal(err.ErrStatus)
	if jsonErr != nil {
		return nil, fmt.Errorf("encoding a refusal: %w", jsonErr)
	}
	code := int(err.ErrStatus.Code)
	resp := &http.Response{
		Status:        strconv.Itoa(code) + " " + http.StatusText(code),
		StatusCode:    code,
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
		Header:        make(http.Header),
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		Request:       r,
	}
	setHeaders(resp.Header, err, len(body))
	return resp, nil
}

func setHeaders(h http.Header, err *apierrors.StatusError, length int) {
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(length))
	h.Set("Cache-Control", "no-cache, private")
	// 299 is the code of the API server's own warnings. A message that cannot be
	// written as one is in the body all the same.
	if warning, headerErr := utilnet.NewWarningHeader(299, "-", err.ErrStatus.Message); headerErr == nil {
		h.Set("Warning", warning)
	}
	if d := err.ErrStatus.Details; d != nil && d.RetryAfterSeconds > 0 {
		h.Set("Retry-After", strconv.Itoa(int(d.RetryAfterSeconds)))
	}
}
