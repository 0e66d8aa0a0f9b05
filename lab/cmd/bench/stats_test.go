// SPDX-License-Identifier: Apache-2.0

package main

import "testing"

func TestEstimate(t *testing.T) {
	for _, tt := range []struct {
		values []float64
		want   estimate
	}{
		{[]float64{3}, estimate{3, 3, 3}},
		{[]float64{1, 2}, estimate{1.5, 1, 2}},
		{[]float64{5, 1, 3, 2, 4}, estimate{3, 1, 5}},
		// Of ten values, the second and the ninth have 97.9 %; the third and the
		// eighth would have 89 %.
		{[]float64{10, 9, 8, 7, 6, 5, 4, 3, 2, 1}, estimate{5.5, 2, 9}},
	} {
		if got := estimateOf(tt.values); got != tt.want {
			t.Errorf("estimate of %v: got %v; want %v", tt.values, got, tt.want)
		}
	}
}
