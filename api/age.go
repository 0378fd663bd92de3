// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package api

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// maxAgeDays bounds what ParseAge reads.
const maxAgeDays = 100 * 365

// ParseAge reads "90d", or a duration of Go such as "36h" or "1h30m".
func ParseAge(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.Atoi(days)
		if err != nil || n < 0 || n > maxAgeDays {
			return 0, fmt.Errorf("%q is not an age such as 90d or 36h", clip(s))
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not an age such as 90d or 36h", clip(s))
	}
	return d, nil
}
