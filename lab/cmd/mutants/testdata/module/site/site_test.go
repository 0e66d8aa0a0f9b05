// SPDX-License-Identifier: Apache-2.0

package site

import "testing"

func TestNext(t *testing.T) {
	if got := Next(1); got != 2 {
		t.Errorf("got %d", got)
	}
}
