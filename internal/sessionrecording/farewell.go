// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"encoding/json"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxReason is the maximum length of a reason. Some quote what a client sent.
const maxReason = 1000

// shorten cuts reason to maxReason.
func shorten(reason string) string {
	return strings.ToValidUTF8(reason[:min(len(reason), maxReason)], "")
}

// onTerminal returns reason as a line of its own, also for a terminal in raw mode.
func onTerminal(reason string) []byte { return []byte("\r\n" + reason + "\r\n") }

// onErrorStream returns reason in the form in which kubectl reads it from the error
// stream, to print it when the session has ended: a Status, or text in older versions
// of the protocol.
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
