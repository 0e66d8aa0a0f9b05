// SPDX-License-Identifier: Apache-2.0

package apistatus

import "errors"

// caused is a refusal that has a cause.
type caused struct {
	refusal, cause error
}

// Error returns the message of the refusal alone: it may reach the caller.
func (c *caused) Error() string { return c.refusal.Error() }

// Unwrap returns the refusal alone. What decides about a refusal does not look at causes.
func (c *caused) Unwrap() error { return c.refusal }

// Because returns refusal with its cause, which only the log gets: errors of libraries
// name files, sockets and addresses of the proxy's host, which are not the caller's to
// know.
func Because(cause, refusal error) error { return &caused{refusal, cause} }

// Cause returns the cause that [Because] added to err, nil if it has none.
func Cause(err error) error {
	var c *caused
	if !errors.As(err, &c) {
		return nil
	}
	return c.cause
}
