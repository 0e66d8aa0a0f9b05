// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"encoding/json"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxReason is how long a reason may be: some hold what a client wrote.
const maxReason = 1000

// shorten returns a reason of which no more is left than fits.
func shorten(reason string) string {
	return strings.ToValidUTF8(reason[:min(len(reason), maxReason)], "")
}

// onTerminal returns reason as a line of its own, on a terminal in raw mode too.
func onTerminal(reason string) []byte { return []byte("\r\n" + reason + "\r\n") }

// onErrorStream returns reason as what kubectl reads from the error stream and
// prints when the session has ended: a Status, or in older versions of the protocol
// the text.
func onErrorStream(reason string, asStatus bool) []byte {
	if !asStatus {
		return []byte(reason)
	}
	status, err := json.Marshal(metav1.Status{
		Status:  metav1.StatusFailure,
		Reason:  metav1.StatusReasonForbidden,
		Message: reason,
	})
	if err != nil {
		return []byte(reason)
	}
	return status
}
